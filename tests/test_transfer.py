"""Beginning from other weights, with timm's own models at small sizes."""

import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.report import Report
from distill_cli.students.transfer import begin_from
from distill_cli.students.weights import Card, digest, save_student

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
"""What timm's resampling of Swin's tables warns of would end its converter here, where warnings are errors."""

TINYVIT = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2)}
VIT = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "deit": ("deit_tiny_distilled_patch16_224", VIT, {"img_size": 32}, {"img_size": 64}),
    "vit": ("vit_tiny_patch16_224", VIT, {"img_size": 32}, {"img_size": 48}),
    "tinyvit": ("tiny_vit_5m_224", TINYVIT, {"window_sizes": (4, 4, 8, 4)}, {"window_sizes": (6, 6, 12, 6)}),
    "levit": ("levit_128s", {}, {"img_size": 64}, {"img_size": 128}),
    "cait": ("cait_xxs24_224", VIT, {"img_size": 32}, {"img_size": 64}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
             {"img_size": 128, "window_size": 4}, {"img_size": 192, "window_size": 6}),
}  # fmt: skip
"""Name, arguments, and those of a small and of a large input."""
by_case = pytest.mark.parametrize("case", CASES)


def make(case: str, *, large: bool = False, num_classes: int = 4, seed: int = 0) -> nn.Module:
    name, arguments, small, big = CASES[case]
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, **arguments, **(big if large else small))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def heads(model: nn.Module) -> dict[str, Tensor]:
    """The classifiers' tensors, by the names that timm gives them."""
    named = model.pretrained_cfg["classifier"]
    names = (named,) if isinstance(named, str) else named
    return {f"{name}.{part}": model.state_dict()[f"{name}.{part}"] for name in names for part in ("weight", "bias")}


def saved(model: nn.Module, path: Path, classes: tuple[str, ...] | None = None) -> str:
    card = Card("vit", {}, 4, classes, {}, "1" * 64, "2" * 64, "supervised")
    save_student(path / "w.safetensors", model, card)
    return str(path / "w.safetensors")


def begin(
    student: nn.Module, source: str, class_map: str | None = None, classes: tuple[str, ...] | None = None
) -> tuple[dict[str, str | None], str]:
    """What the weights were, and what was said on stderr."""
    said = io.StringIO()
    begun = begin_from(student, source, class_map, classes, Report(stream=said))
    return begun, said.getvalue()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@by_case
def test_weights_of_the_same_model_are_taken_as_they_are(case: str, tmp_path: Path) -> None:
    there, student = make(case), make(case, seed=1)
    begun, said = begin(student, saved(there, tmp_path))
    assert equal(dict(student.state_dict()), dict(there.state_dict()))
    assert begun == {"init_from": digest(there.state_dict()), "class_map": None}
    assert said == f"beginning from {tmp_path}/w.safetensors, its classifier's rows copied\n"


@by_case
def test_weights_of_another_input_size_are_resampled_and_all_else_is_copied(case: str, tmp_path: Path) -> None:
    there, student = make(case), make(case, large=True, seed=1)
    begin(student, saved(there, tmp_path))
    before, after = there.state_dict(), student.state_dict()
    resampled = {name for name in before if before[name].shape != after[name].shape}
    assert resampled
    assert all(name.endswith(("pos_embed", "attention_biases", "relative_position_bias_table")) for name in resampled)
    assert equal(*({name: state[name] for name in before.keys() - resampled} for state in (before, after)))
    for name in resampled:
        assert after[name].isfinite().all()
        assert float(after[name].mean()) == pytest.approx(float(before[name].mean()), abs=0.01)


@by_case
def test_what_timm_itself_loads_is_what_is_resampled(case: str, tmp_path: Path) -> None:
    """By timm's own `pretrained`, where its converter knows of the input size."""
    if case in ("levit", "cait"):
        pytest.skip("timm loads these at their own size only")
    there, student = make(case), make(case, large=True, seed=1)
    source = saved(there, tmp_path)
    begin(student, source)
    name, arguments, _, large = CASES[case]
    overlay = {"file": source, "num_classes": 4}
    timms = timm.create_model(
        name, pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay, **arguments, **large
    )
    assert equal(dict(student.state_dict()), dict(timms.state_dict()))


def test_a_smooth_table_of_levits_attention_biases_stays_smooth(tmp_path: Path) -> None:
    there, student = make("levit"), make("levit", large=True)
    with torch.no_grad():
        for name, biases in there.named_parameters():
            if name.endswith("attention_biases"):
                side = int(biases.shape[1] ** 0.5)
                biases.copy_(torch.linspace(0, 1, side).repeat(len(biases), side))
    begin(student, saved(there, tmp_path))
    table = student.get_parameter("stages.0.blocks.0.attn.attention_biases").detach()
    assert table.shape == (4, 64)
    rows = table.view(4, 8, 8)
    assert (rows.diff(dim=2) > 0).all()
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))


def test_caits_positions_are_resampled_by_timms_function(tmp_path: Path) -> None:
    there, student = make("cait"), make("cait", large=True)
    begin(student, saved(there, tmp_path))
    expected = resample_abs_pos_embed(there.pos_embed, new_size=[8, 8], num_prefix_tokens=0)
    assert torch.equal(student.pos_embed, expected)


@by_case
def test_other_class_counts_begin_a_new_classifier_and_say_so(case: str, tmp_path: Path) -> None:
    there, student = make(case), make(case, num_classes=3, seed=1)
    own = {name: tensor.clone() for name, tensor in heads(student).items()}
    _, said = begin(student, saved(there, tmp_path))
    assert equal(heads(student), own)
    rest = {name: tensor for name, tensor in there.state_dict().items() if name not in own}
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in rest.items())
    assert said.startswith(
        f"warning: {tmp_path}/w.safetensors: has 4 classes, the student 3, and there is no student.class_map; "
        "the student's classifier begins anew\n"
    )


@by_case
@pytest.mark.parametrize("suffix", [".json", ".txt"])
def test_a_class_map_gathers_rows_and_a_new_class_is_their_mean(case: str, suffix: str, tmp_path: Path) -> None:
    there, student = make(case), make(case, num_classes=3, large=True, seed=1)
    path = tmp_path / f"map{suffix}"
    path.write_text("[2, null, 0]" if suffix == ".json" else "2\n-1\n0\n")
    begun, said = begin(student, saved(there, tmp_path), str(path))
    for name, tensor in heads(there).items():
        expected = torch.stack([tensor[2], tensor.mean(dim=0), tensor[0]])
        torch.testing.assert_close(heads(student)[name], expected)
    assert begun["class_map"]
    assert said.endswith(f"its classifier's rows gathered by {path}, 1 of them the mean of all\n")


def test_a_map_is_known_by_what_it_says_and_not_by_its_file(tmp_path: Path) -> None:
    source = saved(make("vit"), tmp_path)
    texts = {"a.json": "[1, 0, 3]", "b.txt": "1 0 3", "c.txt": "1 0 2"}
    found = []
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        found.append(begin(make("vit", num_classes=3), source, str(tmp_path / name))[0]["class_map"])
    assert found[0] == found[1] != found[2]


def test_classes_of_the_same_names_in_another_order_keep_their_rows(tmp_path: Path) -> None:
    there, student = make("deit"), make("deit", seed=1)
    source = saved(there, tmp_path, ("a", "b", "c", "d"))
    _, said = begin(student, source, classes=("c", "a", "d", "b"))
    for name, tensor in heads(there).items():
        assert torch.equal(heads(student)[name], tensor[[2, 0, 3, 1]])
    assert "put in the order of the student's classes" in said


def test_as_many_classes_of_other_names_begin_a_new_classifier(tmp_path: Path) -> None:
    there, student = make("vit"), make("vit", seed=1)
    own = {name: tensor.clone() for name, tensor in heads(student).items()}
    _, said = begin(student, saved(there, tmp_path, ("a", "b", "c", "d")), classes=("a", "b", "c", "x"))
    assert equal(heads(student), own)
    assert "has other classes than the student (no 'x'), and there is no student.class_map" in said


def test_weights_without_a_classifier_begin_a_new_one(tmp_path: Path) -> None:
    there, student = make("vit", num_classes=0), make("vit", seed=1)
    _, said = begin(student, saved(there, tmp_path))
    assert "warning: " in said
    assert "has no classifier; the student's classifier begins anew" in said
    assert torch.equal(student.pos_embed, there.pos_embed)


def test_the_fits_of_weights_in_half_precision_are_float32(tmp_path: Path) -> None:
    there, student = make("deit").half(), make("deit", large=True, num_classes=2)
    (tmp_path / "map.txt").write_text("3 -1")
    begin(student, saved(there, tmp_path), str(tmp_path / "map.txt"))
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(student.head.weight[1], there.head.weight.float().mean(dim=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("of", "to"), [("deit", "vit"), ("vit", "deit"), ("tinyvit", "levit"), ("swin", "tinyvit")])
def test_weights_of_another_architecture_are_refused_by_name(of: str, to: str, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"w.safetensors: does not fit \w+ \((missing|unknown) \w+") as caught:
        begin(make(to), saved(make(of), tmp_path))
    assert caught.value.exit_code == 3


def test_a_key_that_fits_nowhere_is_refused_by_name(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in make("tinyvit").state_dict().items()}
    state["stages.9.blocks.0.attn.attention_biases"] = torch.ones(2, 9)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(MismatchError, match=r"unknown stages\.9\.blocks\.0\.attn\.attention_biases"):
        begin(make("tinyvit"), str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 1", r"student.class_map .*: is of 2 classes, the student has 3; give one for each"),
        ("0 1 4", r"student.class_map .*: has class 4, the weights have 4 classes; give ids below that"),
    ],
)
def test_a_map_of_other_classes_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(MismatchError, match=said):
        begin(make("vit", num_classes=3), saved(make("vit"), tmp_path), str(tmp_path / "map.txt"))


def test_a_map_without_rows_to_take_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("0 1 2")
    with pytest.raises(MismatchError, match="the weights have no classifier to take rows from; leave it out"):
        begin(make("vit", num_classes=3), saved(make("vit", num_classes=0), tmp_path), str(tmp_path / "map.txt"))


def test_a_run_that_is_not_finished_and_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="not a finished run; run its distill train command again to finish it"):
        begin(make("vit"), str(tmp_path))
    with pytest.raises(UsageError, match="no such weights file"):
        begin(make("vit"), str(tmp_path / "none.safetensors"))
