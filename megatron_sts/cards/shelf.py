"""Where the examples are, and which there are."""

from __future__ import annotations

from pathlib import Path

import megatron_sts
from megatron_sts.cards.card import FILE, Card, read_card
from megatron_sts.config.errors import ConfigError, refuse

EXAMPLES = "examples"


def read_cards(name: str | None = None) -> dict[str, Card]:
    """By the example's name, in order of names; of one example, which may also be called by its folder.

    Raises:
        ConfigError: there are no examples here, none of that name, or a card is not as it must be.
    """
    folders = {path.parent.name: path.parent for path in sorted(examples_folder().glob(f"*/{FILE}"))}
    if name is not None:
        wanted = Path(name).name
        if wanted not in folders:
            refuse("NAME", name, "no such example", f"take one of {', '.join(folders)}")
        folders = {wanted: folders[wanted]}
    return {name: read_card(folder) for name, folder in folders.items()}


def examples_folder() -> Path:
    """That of the clone from which the package is run; else of the clone in which one is.

    Raises:
        ConfigError: neither is there, as after installing a wheel.
    """
    places = (Path(megatron_sts.__file__).parents[1] / EXAMPLES, Path.cwd() / EXAMPLES)
    for place in places:
        if any(place.glob(f"*/{FILE}")):
            return place
    raise ConfigError(
        f"{EXAMPLES}: neither beside the package ({places[0]}) nor in the current folder, as installed packages do not hold "
        "them; start this in a clone of the repository"
    )
