"""A teacher that looks at what the student sees, beside it, in place of a store."""

import contextlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.config import Colour
from distill_cli.sparse import SparseLogits, top_k
from distill_cli.students.taps import INPUT, Enough, Taps, find_module, glimpse
from distill_cli.teachers import Frozen


class LiveTeacher:
    """A frozen model beside the student. No module, so no optimiser, checkpoint or DDP ever holds it.

    It looks at each batch once, however many ask, and no further than they need.
    """

    def __init__(self, frozen: Frozen, mean: Colour, std: Colour, device: torch.device) -> None:
        """
        Args:
            mean, std: by which the student's images are normalised.
        """
        self.name = frozen.name
        self.num_classes = frozen.num_classes
        self.model: nn.Module = frozen.model.to(device)
        own = frozen.input(None)
        self.image_size = int(own["input_size"][-1])
        # (x std + mean - own mean) / own std, in one multiplication and one addition.
        shift, scale, own_shift, own_scale = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std, own["mean"], own["std"])
        )
        self._scale, self._shift = scale / own_scale, (shift - own_shift) / own_scale
        self._taps: Taps | None = None
        self._names: tuple[str, ...] = ()
        # Until `rows` is asked for, a forward pass ends at the last layer that is tapped.
        self._whole = False
        self._last: tuple[Tensor, Tensor | None, dict[str, Tensor]] | None = None

    def tap(self, *names: str) -> None:
        """Say what `inside` will be asked for, by the names of modules as `Taps` has them.

        Raises:
            UsageError: the teacher has no such layer.
        """
        for name in names:
            find_module(self.model, name.removesuffix(INPUT))
        self._names += names

    def glimpse(self, names: Sequence[str], image_size: int) -> Mapping[str, Tensor]:
        """What some of its layers make of one blank image of the student's size, for their shapes.

        Raises:
            UsageError: it has no such layer, does not use it, or it gives no tensor.
        """
        image = torch.zeros(1, 3, image_size, image_size, device=self._scale.device)
        return glimpse(self.model, names, self.normalised(image))

    def normalised(self, images: Tensor) -> Tensor:
        """The student's images `[batch, 3, height, width]` as the teacher is used to them: its mean, std and size."""
        images = images * self._scale + self._shift
        if images.shape[-1] == self.image_size:
            return images
        size = (self.image_size, self.image_size)
        return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)

    def inside(self, images: Tensor) -> dict[str, Tensor]:
        """What its tapped layers make of the student's images."""
        return self._look(images)[1]

    def rows(self, images: Tensor) -> SparseLogits:
        """Its whole distribution for each of the student's images: k is the number of classes."""
        self._whole = True
        logits = self._look(images)[0]
        assert logits is not None
        return top_k(logits, logits.shape[-1])

    @torch.no_grad()
    def _look(self, images: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self._last is not None and self._last[0] is images and (self._last[1] is not None or not self._whole):
            return self._last[1:]
        self._last = None
        if self._taps is None:
            self._taps = Taps(self.model, self._names)
        self._taps.stop = not self._whole
        logits = None
        with contextlib.suppress(Enough):
            logits = self.model(self.normalised(images))
        inside = {name: value.detach() for name, value in self._taps.take().items()}
        self._last = images, logits, inside
        return logits, inside
