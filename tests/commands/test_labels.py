"""Labels are what their names say, or refused: never a number that happens to fit."""

from __future__ import annotations

import json
import shlex

import pytest

from optimum_rmtkd.commands.labels import check_label_map, class_names, label_values, parse_label_map
from optimum_rmtkd.errors import RMTKDError

from .test_data import Config, class_label, rows_of


def test_labels_as_indices():
    assert label_values(rows_of({"label": [0, 1, 1]}), "label", Config()) == [0, 1, 1]
    assert label_values(rows_of({"label": [True, False]}), "label", Config()) == [1, 0]
    assert label_values(rows_of({"label": [0.0, 1.0]}), "label", Config()) == [0, 1]


def test_class_names_are_matched_with_those_of_the_model():
    rows = rows_of({"label": [0, 1, 1]}, label=class_label("POSITIVE", "Negative"))
    assert label_values(rows, "label", Config()) == [1, 0, 0]


def test_strings_are_matched_with_the_names_of_the_model():
    assert label_values(rows_of({"label": ["Positive", "negative"]}), "label", Config()) == [1, 0]


def test_regression_labels():
    assert label_values(rows_of({"label": [0, 2.5]}), "label", Config(("LABEL_0",))) == [0.0, 2.5]


@pytest.mark.parametrize(
    ("labels", "config", "message"),
    [
        ([0, 1, 2], Config(), "from 0 to 2; the model has 2 classes: expected 0 to 1"),
        ([-1, 0], Config(), "-1 marks rows without a label"),
        ([0.5, 1.0], Config(), "0.5.*2 classes"),
        (["positive", "neutral"], Config(), "'neutral'.*negative, positive"),
        ([None, 1], Config(), "1 of 2 rows have no label"),
        (["a", "b"], Config(("LABEL_0",)), "one output"),
        ([0, 1], Config(problem_type="multi_label_classification"), "multi-label"),
    ],
)
def test_labels_that_do_not_fit(labels, config, message):
    with pytest.raises(RMTKDError, match=message):
        label_values(rows_of({"label": labels}), "label", config)


def test_class_labels_that_do_not_fit():
    rows = rows_of({"label": [0, 1, 1]}, label=class_label("a", "b", "c"))
    with pytest.raises(RMTKDError, match="'a', 'b'.*it knows negative, positive, the data has a, b, c"):
        label_values(rows, "label", Config())
    with pytest.raises(RMTKDError, match="3 classes.*one output"):
        label_values(rows, "label", Config(("LABEL_0",)))


UNNAMED = Config(("LABEL_0", "LABEL_1"))


def values(labels, names, *declared, **more) -> list:
    rows = rows_of({"label": labels}, **({"label": class_label(*declared)} if declared else {}))
    return label_values(rows, "label", Config(names), **more)


@pytest.mark.parametrize(
    ("names", "data", "told"),
    [
        (("dog", "kitten"), ("cat", "dog"), "'dog' is class 1 of the data and class 0 of the model"),
        (("cat", "fish"), ("cat", "dog"), "Some names match and some do not"),
        (("cat", "dog", "fish"), ("cat", "dog", "bird"), "'bird'"),
        (("cat", "dog"), ("cat", "dog", "fish"), "'fish'"),
        (("LABEL_0", "dog"), ("cat", "dog"), "'cat'"),
        (("negative", "positive"), ("bad", "good"), "'bad', 'good'"),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_names_that_do_not_all_match_are_refused(names, data, told, declared):
    labels = list(range(len(data))) if declared else list(data)
    with pytest.raises(RMTKDError, match="--label-map") as caught:
        values(labels, names, *(data if declared else ()))
    assert "".join(f", {name}" for name in names)[2:] in str(caught.value) and ", ".join(sorted(data)) in (
        str(caught.value).replace("cat, dog, bird", "bird, cat, dog")
    )
    if declared or "is class" not in told:
        assert told in str(caught.value)


def test_names_in_another_order_are_matched_by_name():
    assert values([0, 1, 2], ("cat", "dog", "fish"), "fish", "cat", "dog") == [2, 0, 1]
    assert values(["dog", "cat"], ("cat", "dog")) == [1, 0]


def test_a_declared_class_without_a_row_does_not_matter():
    assert values([0, 1], ("cat", "dog"), "dog", "cat", "hidden") == [1, 0]


def test_case_and_blanks_do_not_matter_unless_they_tell_classes_apart():
    assert values([" POSITIVE", "Negative "], ("negative", "positive")) == [1, 0]
    assert values(["US", "us"], ("us", "US")) == [1, 0]
    with pytest.raises(RMTKDError, match="'Us'"):
        values(["Us"], ("us", "US"))


def test_a_model_without_names_takes_declared_numbers_and_says_so(capsys):
    assert values([0, 1, 1], ("LABEL_0", "LABEL_1"), "bad", "good") == [0, 1, 1]
    assert "bad, good are taken as 0 to 1" in capsys.readouterr().out
    with pytest.raises(RMTKDError, match="3 classes .*the model has 2"):
        values([0, 1, 1], ("LABEL_0", "LABEL_1"), "bad", "good", "so so")


def test_a_model_without_names_asks_for_those_of_a_table():
    with pytest.raises(RMTKDError, match="knows LABEL_0, LABEL_1.*--label-map bad=LABEL_0 good=LABEL_1"):
        values(["good", "bad"], ("LABEL_0", "LABEL_1"))
    assert values(["LABEL_1", "label_0"], ("LABEL_0", "LABEL_1")) == [1, 0]


def test_numbers_in_any_form():
    for labels in ([1, 0], ["1", "0"], [1.0, 0.0], [True, False], ["True", "false"][:1] + ["False"]):
        assert values(labels, ("LABEL_0", "LABEL_1")) == [1, 0]
    assert values([True, False], ("true", "false")) == [0, 1]  # by name, where there are such names


def test_numbers_that_are_names_too():
    assert values([3, 5, 1], ("1", "2", "3", "4", "5")) == [2, 4, 0]
    assert values(["0", "1"], ("0", "1")) == [0, 1]
    with pytest.raises(RMTKDError, match="1 is class 0 by name and class 1 by number|0 is class 1 by name"):
        values([0, 1], ("1", "0"))
    with pytest.raises(RMTKDError, match="'0'"):
        values([0, 1, 4], ("1", "2", "3", "4", "5"))


@pytest.mark.parametrize("label", ["NA", "None", "null", "nan", "n/a", "inf"])
def test_words_are_names(label):
    assert values([label, "spam"], (label, "spam")) == [0, 1]


@pytest.mark.parametrize("value", ["NA", "", "inf", "-inf", "nan", "1,5", "word", float("nan"), float("inf"), [1.0]])
def test_numbers_of_a_regression_are_finite(value):
    labels = ["1.5", value] if isinstance(value, str) else [1.5, value] if isinstance(value, float) else [[1.5], value]
    row = 1 if isinstance(value, list) else 2
    with pytest.raises(RMTKDError, match=f"in row {row}; the model has one output"):
        values(labels, ("LABEL_0",))
    assert values(["1.5", "-2e3"], ("LABEL_0",)) == [1.5, -2000.0]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.5])
def test_class_indices_are_whole_numbers(number):
    with pytest.raises(RMTKDError, match="in row 2; the model has 2 classes"):
        values([1.0, number], ("a", "b"))


def test_rows_without_a_class_are_named():
    with pytest.raises(RMTKDError, match="1 of 3 rows have no label, the first of them row 2"):
        values(["a", None, "b"], ("a", "b"))
    with pytest.raises(RMTKDError, match="holds -1 in row 2 .-1 marks rows without a label"):
        values([0, -1], ("a", "b"), "a", "b")


def test_two_tables_of_a_config():
    config = Config(("LABEL_0", "LABEL_1"))
    config.id2label = {0: "bad", 1: "good"}
    assert class_names(config) == ["bad", "good"]
    config.label2id = {"good": 0, "bad": 1}
    with pytest.raises(RMTKDError, match="contradicts itself"):
        class_names(config)


# -- label-map --------------------------------------------------------------------------------------------------------


def test_label_map_as_pairs_json_and_file(tmp_path):
    wanted = {"cat": "LABEL_0", "a=b": "LABEL_1"}
    (tmp_path / "map.json").write_text(json.dumps(wanted))
    assert parse_label_map(["cat=LABEL_0", "a=b=LABEL_1"]) == wanted
    assert parse_label_map([json.dumps(wanted)]) == wanted
    assert parse_label_map([str(tmp_path / "map.json")]) == wanted
    assert parse_label_map(['{"1": 0, "2": 1}']) == {"1": "0", "2": "1"}
    (tmp_path / "marked.json").write_text(json.dumps(wanted), encoding="utf-8-sig")  # as editors of Windows save it
    assert parse_label_map([str(tmp_path / "marked.json")]) == wanted
    assert parse_label_map(None) == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cat"], "expected NAME=CLASS"),
        (["cat="], "expected NAME=CLASS"),
        (["=LABEL_0"], "expected NAME=CLASS"),
        (["cat=a", "dog"], "'dog': expected NAME=CLASS"),
        (["cat=a", "cat=b"], "'cat' both to 'a' and to 'b'"),
        (['{"cat": 0, "cat": 1}'], "the key 'cat' stands there twice"),
        (["{"], "is not JSON"),
        (['{"a":' * 100_000], "is not JSON"),
        (['{"cat": [0]}'], "expected an object of names"),
        (['{"cat": true}'], "expected an object of names"),
        (["missing.json"], "no such file"),
    ],
)
def test_label_maps_that_say_nothing(words, told):
    with pytest.raises(RMTKDError, match="--label-map") as caught:
        parse_label_map(words)
    assert told in str(caught.value)


def test_label_map_file_that_is_none(tmp_path):
    for name, content in (("a.json", b"\xff\xfe"), ("b.json", b"[1]"), ("c.json", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RMTKDError):
            parse_label_map([str(tmp_path / name)])


def test_label_map_decides():
    given = {"cat": "kitten"}
    assert values([0, 1], ("dog", "kitten"), "cat", "dog", label_map=given) == [1, 0]
    assert values(["good", "bad"], ("LABEL_0", "LABEL_1"), label_map={"good": "LABEL_0", "bad": "1"}) == [0, 1]
    assert values([1, 2], ("LABEL_0", "LABEL_1"), label_map={"1": "LABEL_1", "2": "LABEL_0"}) == [1, 0]
    assert values([0, 1], ("1", "0"), label_map={"0": "1", "1": "0"}) == [0, 1]
    assert values(["a", "b", "c"], ("x", "y"), label_map={"a": "x", "b": "x", "c": "y"}) == [0, 0, 1]


def test_numbers_that_the_map_does_not_name_stay_class_indices(capsys):
    assert values([-1, 1], ("LABEL_0", "LABEL_1"), label_map={"-1": "LABEL_0"}) == [0, 1]
    assert "labels that --label-map does not name are class indices: 1" in capsys.readouterr().out


def test_label_map_that_does_not_fit():
    with pytest.raises(RMTKDError, match="names the class 'fish', which the model does not have; it has dog, kitten"):
        values(["cat", "dog"], ("dog", "kitten"), label_map={"cat": "fish"})
    with pytest.raises(RMTKDError, match="'bad'"):
        values(["good", "bad"], ("LABEL_0", "LABEL_1"), label_map={"good": "LABEL_0"})
    with pytest.raises(RMTKDError, match="and says nothing of the label 1, .*--label-map 0=LABEL_1 1=CLASS"):
        values([0, 1], ("LABEL_0", "LABEL_1"), label_map={"0": "1"})  # joined, or half of an exchange?
    with pytest.raises(RMTKDError, match="'2'"):
        values([1, 2], ("LABEL_0", "LABEL_1"), label_map={"1": "LABEL_1"})
    with pytest.raises(RMTKDError, match="--label-map is for classes"):
        values([1.0], ("LABEL_0",), label_map={"1": "0"})
    rows = [rows_of({"label": ["cat"]}), rows_of({"label": ["dog"]})]
    check_label_map({"dog": "x", "CAT": "y"}, rows, "label")
    with pytest.raises(RMTKDError, match="names 'dgo', which is no label in column 'label'; it holds cat, dog"):
        check_label_map({"dgo": "x"}, rows, "label")


def test_validation_rows_are_read_as_the_training_rows():
    train = rows_of({"label": [0, 1, 2]}, label=class_label("bad", "good", "so so"))
    held_out = rows_of({"label": [0, 1]}, label=class_label("good", "so so"))
    names = Config(("LABEL_0", "LABEL_1", "LABEL_2"))
    assert label_values(held_out, "label", names, like=train) == [1, 2]
    with pytest.raises(RMTKDError, match="'new'"):
        label_values(rows_of({"label": [0]}, label=class_label("new")), "label", names, like=train)


def test_the_hint_for_labels_that_look_like_options_can_be_typed():
    """-1=negative would be read as an option."""
    rows = rows_of({"label": [-1, 1]})
    with pytest.raises(RMTKDError, match="from -1 to 1") as caught:
        label_values(rows, "label", Config())
    words = shlex.split(str(caught.value).partition("--label-map ")[2])
    label_map = parse_label_map(words[:1])
    assert label_map == {"-1": "negative", "1": "positive"}
    assert label_values(rows, "label", Config(), label_map) == [0, 1]
