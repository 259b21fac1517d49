"""Scenes: determinism, splits, answers that follow from the scene, balance, rendering, licences."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import numpy as np
import pytest

from megatron_sts.data.records import IMAGE_MARKER, Record
from megatron_sts.data.scenes.catalog import KINDS, asset, load_catalog
from megatron_sts.data.scenes.patches import PATCHES, num_patch_classes, patch_labels
from megatron_sts.data.scenes.questions import EVALUATED_FAMILIES, FAMILIES, NEGATIVES, ask, ask_pair, existence_variant
from megatron_sts.data.scenes.render import DigitSplit, Style, render
from megatron_sts.data.scenes.scene import CROWD, Scene, draw_crowded_scene, draw_scene, load_pool
from megatron_sts.data.scenes.source import EvalQuestion, Mode, ScenesSource, Split, evaluation_questions
from megatron_sts.data.scenes.words import caption, grid_map

MODES: tuple[Mode, ...] = ("caption", "questions", "words", "map", "words_and_map", "induction")
ALL_FAMILIES = tuple(FAMILIES)
NUM_SCENES = 3000
CLOSED: dict[str, set[str]] = {
    "existence": {"yes", "no"},
    "relation": {"yes", "no"},
    "paired": {"yes", "no"},
    "category": set(KINDS),
    "counting": {"1", "2", "3"},
    "choice": {"a", "b", "c"},
    "locate": {f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")},
}


@cache
def scenes() -> list[Scene]:
    rng = random.Random(0)
    return [draw_scene(rng, load_pool("train")) for _ in range(NUM_SCENES)]


def source(mode: Mode = "questions", seed: int = 0, split: Split = "train", **options: object) -> ScenesSource:
    return ScenesSource(mode, seed, split, ALL_FAMILIES, 6, 100, **options)  # type: ignore[arg-type]


def text(record: Record) -> str:
    return " | ".join(turn.text for turn in record.turns)


def things(words: str) -> dict[str, str]:
    """Place -> what stands there, read from a caption: the independent derivation that answers are checked against."""
    items = [item.split(" ", 2) for item in words.split(" , ")]
    return {f"{row} {column}": what for row, column, what in items}


def derived_answer(question: str, words: str) -> str:
    """The answer to a question, from the caption alone."""
    places = things(words)
    where = {what: place for place, what in places.items()}
    counts = Counter(places.values())
    q = question.split()
    match q:
        case ["is", "there", "a", name, "?"]:
            return "yes" if name in counts else "no"
        case ["is", "the", name, "at", row, column, "?"]:
            return "yes" if places.get(f"{row} {column}") == name else "no"
        case ["is", "the", a, ("left" | "right") as word, "of", "the", b, "?"]:
            order = [("left", "center", "right").index(where[name].split()[1]) for name in (a, b)]
            return "yes" if (order[0] < order[1] if word == "left" else order[0] > order[1]) else "no"
        case ["is", "the", a, ("above" | "below") as word, "the", b, "?"]:
            order = [("top", "middle", "bottom").index(where[name].split()[0]) for name in (a, b)]
            return "yes" if (order[0] < order[1] if word == "above" else order[0] > order[1]) else "no"
        case ["what", "kind", "is", "at", row, column, "?"]:
            return load_catalog().kinds[load_catalog().names.index(places[f"{row} {column}"])]
        case ["how", "many", name, "?"]:
            return str(counts[name])
        case ["are", "there", number, name, "?"]:
            return "yes" if counts[name] == int(number) else "no"
        case ["what", "number", "?"]:
            return next(what for what in counts if what.startswith("number")).removeprefix("number ")
        case ["which", "is", "here", "?", "a", a, "b", b, "c", c]:
            (letter,) = [letter for letter, name in zip("abc", (a, b, c), strict=True) if name in counts]
            return letter
        case ["where", "is", "the", name, "?"]:
            assert counts[name] == 1
            return where[name]
        case ["what", "is", "at", row, column, "?"]:
            return places[f"{row} {column}"]
    raise AssertionError(f"unknown question {question!r}")


def words_shown(record: Record) -> set[str]:
    return set(text(record).split()) & set(load_catalog().names)


@pytest.mark.parametrize("mode", MODES)
def test_record_is_a_pure_function_of_seed_split_and_index(mode: Mode) -> None:
    one, other = source(mode), source(mode)
    assert [text(one[i]) for i in range(20)] == [text(other[i]) for i in reversed(range(20))][::-1]
    for changed in (source(mode, seed=1), source(mode, split="eval")):
        assert not {text(one[i]) for i in range(20)} & {text(changed[i]) for i in range(20)}
    for image, again in zip(one[3].images, other[3].images, strict=True):
        np.testing.assert_array_equal(image(), again())


@pytest.mark.parametrize("mode", MODES)
def test_turns_alternate_and_markers_match_images(mode: Mode) -> None:
    for i in range(50):
        record = source(mode)[i]
        assert [turn.role for turn in record.turns] == ["user", "assistant"] * (len(record.turns) // 2)
        assert text(record).count(IMAGE_MARKER) == len(record.images) == (mode in ("caption", "questions"))
        assert " ".join(text(record).split()) == text(record).lower()


def test_fractions_mix_text_and_drills_into_an_image_mode() -> None:
    mixed = source(induction_fraction=0.25, text_only_fraction=0.5)
    records = [mixed[i] for i in range(400)]
    drills = sum("followed" in text(record) for record in records) / len(records)
    with_image = sum(bool(record.images) for record in records) / len(records)
    assert abs(drills - 0.25) < 0.1 and abs(with_image - 0.375) < 0.1  # four standard deviations of 400 draws


@pytest.mark.parametrize("mode", ["caption", "questions"])
def test_heldout_sprites_are_disjoint_from_training_images(mode: Mode) -> None:
    catalog = load_catalog()
    heldout = {name for name, held in zip(catalog.names, catalog.heldout, strict=True) if held}
    for i in range(300):
        assert not words_shown(source(mode)[i]) & heldout
        assert not words_shown(source(mode, split="eval")[i]) & heldout
        assert words_shown(source(mode, split="eval_heldout")[i]) <= heldout


def test_text_modes_teach_every_name() -> None:
    seen: set[str] = set()
    for i in range(1500):
        seen |= words_shown(source("words_and_map")[i])
    assert seen == set(load_catalog().names)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_answers_follow_from_the_scene_and_are_balanced(family: str) -> None:
    rng, pool = random.Random(1), load_pool("train")
    asked = [(question, scene) for scene in scenes() if (question := ask(family, scene, pool, rng))]
    assert len(asked) > NUM_SCENES / 3
    for question, scene in asked:
        assert question.answer == derived_answer(question.text, caption(scene)), question
    answers = Counter(question.answer for question, _ in asked)
    if family in CLOSED:
        # Uniform up to sampling: five standard deviations of a binomial count.
        share = 1 / len(CLOSED[family])
        bound = 5 * (len(asked) * share * (1 - share)) ** 0.5
        assert set(answers) == CLOSED[family]
        assert all(abs(count - len(asked) * share) < bound for count in answers.values()), answers
    else:
        assert answers.most_common(1)[0][1] < 0.03 * len(asked)


@pytest.mark.parametrize("variant", NEGATIVES)
def test_popularity_of_the_name_does_not_tell_whether_it_is_there(variant: str) -> None:
    rng, pool = random.Random(3), load_pool("train")
    popular = {load_catalog().names[sprite] for sprite in pool.popular}
    shares = {}
    for answer in ("yes", "no"):
        asked = [existence_variant(scene, pool, rng, variant, answer) for scene in scenes()]
        names = [question.text.split()[3] for question in asked if question]
        shares[answer] = sum(name in popular for name in names) / len(names)
    assert abs(shares["yes"] - shares["no"]) < 0.06  # four standard deviations of a difference of two shares


def test_pairs_hold_one_yes_and_one_no() -> None:
    rng, pool = random.Random(2), load_pool("train")
    for scene in scenes()[:500]:
        for fact in ("existence", "count", "position"):
            if pair := ask_pair(fact, scene, pool, rng):
                assert [derived_answer(question.text, caption(scene)) for question in pair] == ["yes", "no"]


def test_conversations_ask_every_family() -> None:
    openings = Counter(
        " ".join(turn.text.removeprefix(f"{IMAGE_MARKER} ").split()[:2])
        for i in range(300)
        for turn in source()[i].turns
        if turn.role == "user"
    )
    for opening in ("is there", "is the", "what kind", "how many", "what number", "which is", "where is", "what is"):
        assert openings[opening] > 0.05 * openings.total(), openings


@pytest.mark.parametrize("family", ["ocr", "counting"])
def test_a_rare_family_alone_fills_its_conversations(family: str) -> None:
    record = ScenesSource("words", 0, "train", (family,), 3, 10)[0]
    assert len(record.turns) == 6


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        ScenesSource("words", 0, "train", ("colour",), 3, 10)


@pytest.mark.parametrize("split", ["eval", "eval_heldout"])
@pytest.mark.parametrize("family", EVALUATED_FAMILIES)
def test_evaluation_questions_are_right_and_exactly_balanced(family: str, split: Split) -> None:
    questions = evaluation_questions(family, split, 120, seed=3)
    assert len(questions) == len({question.key for question in questions}) == 120
    assert questions_text(questions) == questions_text(
        evaluation_questions(family, split, 120, seed=3, style="twitter")
    )
    for question in questions:
        assert question.answer == derived_answer(question.question, question.words)
    if family in CLOSED:
        answers = Counter(question.answer for question in questions)
        assert set(answers.values()) == {120 // len(CLOSED[family])}
    if family == "paired":
        pairs = Counter(question.pair for question in questions)
        assert set(pairs.values()) == {2}
    if family == "existence":
        assert set(Counter((question.variant, question.answer) for question in questions).values()) == {20}


def questions_text(questions: list[EvalQuestion]) -> list[tuple[str, str]]:
    return [(question.question, question.words) for question in questions]


def test_crowded_scenes_show_different_sprites_of_the_pool_and_a_number() -> None:
    rng, pool, sizes, shown = random.Random(0), load_pool("train"), set(), set()
    for _ in range(300):
        scene = draw_crowded_scene(rng, pool)
        cells = [placed.cell for placed in scene.objects]
        assert scene.number and len({*cells, scene.number.cell}) == len(cells) + 1
        assert set(scene.counts().values()) == {1}
        sizes.add(len(scene.objects))
        shown.update(scene.counts())
    assert sizes == set(range(CROWD[0], CROWD[1] + 1))
    assert shown == {sprite for sprite, heldout in enumerate(load_catalog().heldout) if not heldout}


@pytest.mark.parametrize("style", ["google", "twitter"])
@pytest.mark.parametrize("digits", ["train", "train_bent", "test"])
def test_rendering_is_deterministic_uint8_rgb(style: Style, digits: DigitSplit) -> None:
    picture = render(scenes()[0], style, digits)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, render(scenes()[0], style, digits))


def test_styles_and_handwriting_differ() -> None:
    scene = next(scene for scene in scenes() if scene.number)
    pictures = [
        render(scene),
        render(scene, "twitter"),
        render(scene, digits="test"),
        render(scene, digits="train_bent"),
    ]
    assert all((pictures[0] != picture).any() for picture in pictures[1:])


def test_patch_labels_mark_every_item_once_at_its_centre() -> None:
    num_sprites = len(load_catalog())
    for scene in scenes()[:300]:
        centre, coverage = patch_labels(scene)
        assert centre.shape == coverage.shape == (PATCHES * PATCHES,) and coverage.max() < num_patch_classes()
        expected = [1 + placed.sprite for placed in scene.objects]
        expected += [1 + num_sprites + digit for digit in scene.number.digits] if scene.number else []
        assert sorted(centre[centre > 0]) == sorted(expected)
        assert set(expected) == set(coverage[coverage > 0].tolist())


def test_grid_map_has_one_word_a_patch_and_names_everything() -> None:
    for scene in scenes()[:100]:
        words = grid_map(scene, random.Random(0)).split()
        assert len(words) == PATCHES * PATCHES
        names = Counter(load_catalog().names[placed.sprite] for placed in scene.objects)
        assert Counter(word for word in words if word in load_catalog().names) == names


def test_shuffled_caption_says_the_same() -> None:
    for scene in scenes()[:100]:
        assert things(caption(scene, random.Random(0))) == things(caption(scene))


def test_catalog_is_single_unique_lowercase_words() -> None:
    catalog = load_catalog()
    assert 150 <= len(catalog) <= 400 and len(set(catalog.names)) == len(catalog)
    assert all(name.isalpha() and name.islower() for name in catalog.names)
    assert set(catalog.kinds) == set(KINDS) and 0.05 < sum(catalog.heldout) / len(catalog) < 0.15


def test_licences_list_every_asset_and_the_sheets_stay_small() -> None:
    licences = asset("LICENSES.md").read_text()
    files = [file for file in asset("").iterdir() if file.name != "LICENSES.md"]
    assert len(files) >= 5
    for file in files:
        assert f"`{file.name}`" in licences
    assert sum(len(file.read_bytes()) for file in files if file.name.endswith(".png")) <= 4 * 2**20
