"""Every leaf that differs is named by its dotted path, and nothing else is."""

from __future__ import annotations

from megatron_sts.config.differences import differences


def test_leaves_are_named_by_their_path() -> None:
    old = {"seed": 1, "gone": 2, "stages": [{"name": "a", "lr": 0.1}, {"name": "b", "lr": 0.2}], "layout": [1, 2]}
    new = {"seed": 1, "fresh": 3, "stages": [{"name": "a", "lr": 0.1}, {"name": "b", "lr": 0.3}], "layout": [2, 1]}
    assert sorted(differences(old, new, "run"), key=str) == [
        ("run.fresh", None, 3),
        ("run.gone", 2, None),
        ("run.layout", [1, 2], [2, 1]),
        ("run.stages.b.lr", 0.2, 0.3),
    ]
    assert list(differences(old, old, "run")) == []


def test_a_section_that_an_earlier_version_did_not_have_says_nothing_while_it_is_null() -> None:
    old, new = {"lr": 1}, {"lr": 1, "parts": {"vision": None, "language": {"lr": None}}}
    assert list(differences(old, new, "optimizer")) == list(differences(new, old, "optimizer")) == []
    new["parts"]["vision"] = {"lr": 0.1}
    assert [field for field, _, _ in differences(old, new, "optimizer")] == ["optimizer.parts"]


def test_lists_of_other_names_differ_by_their_names() -> None:
    old, new = [{"name": "a", "lr": 1}], [{"name": "a", "lr": 2}, {"name": "b", "lr": 3}]
    assert list(differences(old, new, "stages")) == [("stages", ["a"], ["a", "b"])]
