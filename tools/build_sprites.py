"""Rebuilds ``megatron_sts/data/scenes/assets`` from the public emoji tarballs and the digits of scikit-learn.

Fetch the tarballs with ``npm pack emoji-datasource-google@16.0.0`` and ``npm pack emoji-datasource-twitter@16.0.0``.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CELL_PX = 32
SHEET_COLUMNS = 16
HELDOUT_EVERY = 10
NUM_TRAIN_DIGITS = 1400

NAMES = {
    "animal": """monkey gorilla dog wolf cat tiger horse moose deer cow pig sheep goat camel elephant mouse rabbit
        hedgehog bat bear koala sloth otter skunk badger turkey rooster penguin eagle duck swan owl peacock parrot frog
        turtle snake whale dolphin fish shark octopus crab squid snail butterfly bug bee spider scorpion lion fox panda
        unicorn giraffe zebra kangaroo llama flamingo lobster shrimp crocodile lizard ladybug beetle worm seal donkey
        hamster raccoon rhinoceros hippopotamus dinosaur jellyfish ant poodle leopard bison dodo""",
    "food": """grapes melon lemon banana pineapple apple pear cherries strawberry tomato coconut avocado eggplant carrot
        corn broccoli garlic onion bread croissant pretzel pancakes waffle bacon hamburger fries pizza hotdog taco egg
        popcorn butter rice sushi icecream doughnut cake pie coffee beer watermelon peach mango kiwi cookie candy
        lollipop cheese cupcake sandwich burrito spaghetti ramen mushroom pepper cucumber potato blueberries peanuts
        chestnut honey bagel salad chocolate champagne wine cocktail custard bento tangerine lime""",
    "travel": """volcano desert house hospital factory church tent fountain train bus ambulance taxi tractor bike
        scooter anchor boat canoe ferry airplane helicopter rocket moon star cloud rainbow umbrella snowflake fire car
        truck ship parachute satellite sun tornado lightning mountain castle bank school stadium hut wheel compass
        luggage snowman comet hourglass island planet speedboat skateboard carousel mosque""",
    "object": """necktie shirt jeans scarf gloves socks dress crown ring gem bell guitar trumpet violin drum radio computer
        candle book scroll key hammer bomb magnet microscope telescope pill door chair toilet razor bucket sponge
        scissors lock boot sandal coat bikini purse camera battery flashlight wrench axe shield basket broom ladder
        mirror window screwdriver toothbrush saxophone banjo accordion bulb newspaper mailbox envelope balloon
        gift ribbon trophy basketball football soccer baseball tennis yarn kite dart gear phone headphones lipstick
        backpack coin maracas shorts harp""",
}
"""Sprite names by kind, each one lowercase English word; no sprite shows digits, which would spoil number reading."""

SHORT_NAMES = {
    "lion": "lion_face",
    "fox": "fox_face",
    "panda": "panda_face",
    "unicorn": "unicorn_face",
    "giraffe": "giraffe_face",
    "zebra": "zebra_face",
    "dinosaur": "sauropod",
    "kiwi": "kiwifruit",
    "cheese": "cheese_wedge",
    "pepper": "hot_pepper",
    "honey": "honey_pot",
    "salad": "green_salad",
    "chocolate": "chocolate_bar",
    "wine": "wine_glass",
    "drum": "drum_with_drumsticks",
    "sun": "sun_with_face",
    "castle": "european_castle",
    "island": "desert_island",
    "planet": "ringed_planet",
    "carousel": "carousel_horse",
    "envelope": "email",
    "backpack": "school_satchel",
}
"""Where our word differs from the short name in ``emoji.json``."""

LICENSES = """# Sources and licences of the embedded scene assets

| file | source | licence |
|---|---|---|
| `sprites_google.png` | Noto Emoji, (c) Google LLC, via `emoji-datasource-google` 16.0.0; downscaled | Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0 |
| `sprites_twitter.png` | Twemoji, (c) Twitter, Inc. and other contributors, via `emoji-datasource-twitter` 16.0.0; downscaled | CC-BY-4.0, https://creativecommons.org/licenses/by/4.0/ |
| `catalog.json` | names derived from `emoji.json` of emoji-data, (c) Cal Henderson | MIT, https://github.com/iamcal/emoji-data/blob/master/LICENSE |
| `digits.npz` | E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, via scikit-learn `load_digits`; repacked | CC-BY-4.0, https://creativecommons.org/licenses/by/4.0/ |
| `tokenizer.model` | SentencePiece model trained by `tools/train_tokenizer.py` on this package's templates and on Python's `pydoc_data.topics` (statistics only, no text is shipped) | the licence of this package; Python documentation: PSF-2.0, https://docs.python.org/3/license.html |

Changes made to the images: resized to small cells with premultiplied alpha and packed into one sheet a style.
"""


def catalog_entries() -> list[dict[str, str | bool]]:
    """The catalog, ordered by kind; every ``HELDOUT_EVERY``-th sprite of a kind is kept from training images."""
    entries: list[dict[str, str | bool]] = []
    for kind, text in NAMES.items():
        for i, name in enumerate(text.split()):
            entries.append({"name": name, "kind": kind, "heldout": i % HELDOUT_EVERY == HELDOUT_EVERY // 2})
    return entries


def shrink(image: Image.Image) -> np.ndarray:
    """Downscales RGBA to uint8 ``[CELL_PX, CELL_PX, 4]`` with premultiplied alpha, so that edges keep no dark fringe."""
    small = image.convert("RGBA").convert("RGBa").resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS)
    return np.asarray(small.convert("RGBA"))


def sprite_cells(tarball: Path, style: str, names: list[str]) -> Iterator[np.ndarray]:
    """Yields the cell of each name, read from ``img/<style>/64`` of the tarball."""
    with tarfile.open(tarball) as tar:
        members = {member.name: member for member in tar.getmembers()}

        def read(path: str) -> bytes:
            file = tar.extractfile(members[f"package/{path}"])
            assert file is not None
            return file.read()

        images = {entry["short_name"]: entry["image"] for entry in json.loads(read("emoji.json"))}
        for name in names:
            image = images[SHORT_NAMES.get(name, name)]
            yield shrink(Image.open(io.BytesIO(read(f"img/{style}/64/{image}"))))


def write_sheet(path: Path, cells: list[np.ndarray]) -> None:
    """Packs the cells row by row into one RGBA sheet."""
    num_rows = -(-len(cells) // SHEET_COLUMNS)
    sheet = np.zeros((num_rows * CELL_PX, SHEET_COLUMNS * CELL_PX, 4), np.uint8)
    for i, cell in enumerate(cells):
        top, left = i // SHEET_COLUMNS * CELL_PX, i % SHEET_COLUMNS * CELL_PX
        sheet[top : top + CELL_PX, left : left + CELL_PX] = cell
    Image.fromarray(sheet).save(path, optimize=True)


def write_digits(path: Path) -> None:
    """Writes ``images`` uint8 ``[N, 8, 8]`` (0..16), ``labels`` uint8 ``[N]`` and ``is_test`` bool ``[N]``.

    The order of the data set follows its writers, so the last part is unseen handwriting.
    """
    digits = load_digits()
    np.savez_compressed(
        path,
        images=digits.images.astype(np.uint8),
        labels=digits.target.astype(np.uint8),
        is_test=np.arange(len(digits.target)) >= NUM_TRAIN_DIGITS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--google", type=Path, required=True, help="emoji-datasource-google-16.0.0.tgz")
    parser.add_argument("--twitter", type=Path, required=True, help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the assets to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    entries = catalog_entries()
    names = [str(entry["name"]) for entry in entries]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (args.out / "catalog.json").write_text(f"[\n{lines}\n]\n")
    for style, tarball in (("google", args.google), ("twitter", args.twitter)):
        write_sheet(args.out / f"sprites_{style}.png", list(sprite_cells(tarball, style, names)))
    write_digits(args.out / "digits.npz")
    (args.out / "LICENSES.md").write_text(LICENSES)


if __name__ == "__main__":
    main()
