"""`distill quickstart`."""


def command() -> None:
    """Teacher, store, student and comparison on real images, in minutes."""
