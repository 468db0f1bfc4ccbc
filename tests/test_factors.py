from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors, unscaled

QUICK = settings(max_examples=50, deadline=None, database=None)
POSITIVE = st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False)


def example() -> FactorTable:
    rows = (unscaled(4, 256), RopeFactors(2048, (1.0, 1.5, 4.25, 8.0), start_tokens=4, attention_factor=1.09))
    return FactorTable(200.0, 8, 256, rows, model="tiny", provenance={"method": "evolution", "seed": 0})


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = example().to_dict()
    change(data)
    return data


@st.composite
def tables(draw: st.DrawFn) -> FactorTable:
    pairs = draw(st.integers(1, 6))
    rows = tuple(
        RopeFactors(
            up_to,
            tuple(draw(st.lists(POSITIVE, min_size=pairs, max_size=pairs))),
            start_tokens=draw(st.integers(0, 256)),
            attention_factor=draw(POSITIVE),
        )
        for up_to in sorted(draw(st.sets(st.integers(1, 2**21), min_size=1, max_size=4)))
    )
    model = draw(st.none() | st.text(max_size=8))
    provenance = draw(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3))
    original = draw(st.integers(1, 2**17))
    return FactorTable(draw(POSITIVE), 2 * pairs, original, rows, model, provenance)


@QUICK
@given(tables())
def test_every_table_survives_json(table: FactorTable) -> None:
    again = FactorTable.from_dict(json.loads(table.to_json()))
    assert again == table
    assert again.to_json() == table.to_json()
    assert [row.key for row in again.rows] == [row.key for row in table.rows]


def test_a_saved_file_loads_as_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    example().save(path)
    assert FactorTable.load(path) == example()
    assert FactorTable.load(str(path)) == example()
    assert [entry.name for entry in tmp_path.iterdir()] == ["factors.json"]


@pytest.mark.parametrize("name", ["{folder}", "{folder}/", "{folder}/../base", "base", "./base", "{folder}-that-was"])
def test_a_table_that_is_given_away_names_no_folder_of_this_machine(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    told = replace(example(), model=name.format(folder=tmp_path / "base")).to_be_given_away()
    assert told == replace(example(), model="base-that-was" if name.endswith("was") else "base")


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "tiny", "", "x" * 5000, "\0", None])
def test_a_name_that_is_no_folder_stays_in_it(name: str | None) -> None:
    assert replace(example(), model=name).to_be_given_away().model == name


def test_a_file_has_the_keys_of_the_format_and_no_more() -> None:
    assert list(example().to_dict()) == [
        *("format", "version", "rope_theta", "rotary_dim", "original_length", "table", "model", "provenance")
    ]
    bare = FactorTable(200.0, 2, 256, (unscaled(1, 256),)).to_dict()
    assert bare == {
        "format": "longrope-factors",
        "version": 1,
        "rope_theta": 200.0,
        "rotary_dim": 2,
        "original_length": 256,
        "table": [{"up_to": 256, "rescale": [1.0], "start_tokens": 0, "attention_factor": 1.0}],
    }


def _set(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        place: Any = data
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


def _drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        place: Any = data
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return change


NUMBER = "it is a finite, positive number"
REFUSALS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_set("format", to="gguf"), "factors: format: got format 'gguf'; it is \"longrope-factors\""),
    (_drop("format"), 'factors: format: got format None; it is "longrope-factors"'),
    (_set("version", to=2), "factors file: got version 2; this longrope reads version 1"),
    (_set("version", to="1"), "factors file: got version '1'; this longrope reads version 1"),
    (_set("version", to=True), "factors file: got version True; this longrope reads version 1"),
    (_drop("version"), "factors file: got version None; this longrope reads version 1"),
    (_set("table", 1, "rescale", to=[1.0, 2.0]), "rescale: got 2 numbers; rotary_dim 8 has 4 pairs"),
    (_set("rotary_dim", to=16), "rescale: got 4 numbers; rotary_dim 16 has 8 pairs"),
    (_set("rotary_dim", to=7), "rotary_dim: got 7; it is even"),
    (_set("rotary_dim", to=8.0), "rotary_dim: got 8.0; it is a whole number of at least 2"),
    (_set("table", 1, "rescale", 2, to=float("nan")), f"rescale[2]: got nan; {NUMBER}"),
    (_set("table", 1, "rescale", 2, to=float("inf")), f"rescale[2]: got inf; {NUMBER}"),
    (_set("table", 1, "rescale", 2, to=10**400), "rescale[2]: got 1000"),
    (_set("table", 1, "rescale", 0, to=0.0), f"rescale[0]: got 0.0; {NUMBER}"),
    (_set("table", 1, "rescale", 0, to=-1.0), f"rescale[0]: got -1.0; {NUMBER}"),
    (_set("table", 1, "rescale", 3, to=True), f"rescale[3]: got True; {NUMBER}"),
    (_set("table", 1, "rescale", 3, to="8"), f"rescale[3]: got '8'; {NUMBER}"),
    (_set("table", 1, "rescale", 3, to=None), f"rescale[3]: got None; {NUMBER}"),
    (_set("table", 1, "rescale", 3, to=[8.0]), f"rescale[3]: got [8.0]; {NUMBER}"),
    (_set("table", 1, "rescale", to="1234"), "rescale: got '1234'; it is a list of d/2 numbers"),
    (_set("table", 1, "rescale", to=[]), "rescale: got []; it is a list of d/2 numbers"),
    (_set("table", 1, "rescale", to={"0": 1.0}), "rescale: got {'0': 1.0}; it is a list of d/2 numbers"),
    (_set("table", 1, "start_tokens", to=-1), "start_tokens: got -1; it is a whole number of at least 0"),
    (_set("table", 1, "start_tokens", to=False), "start_tokens: got False; it is a whole number of at least 0"),
    (_set("table", 1, "up_to", to=2048.5), "up_to: got 2048.5; it is a whole number of at least 1"),
    (_set("table", 1, "attention_factor", to=0), f"attention_factor: got 0; {NUMBER}"),
    (_set("table", 1, "up_to", to=256), "table: got up_to [256, 256]; rows ascend by up_to"),
    (_set("table", 1, "up_to", to=128), "table: got up_to [256, 128]; rows ascend by up_to"),
    (_set("table", to=[]), "table: got no rows; it has at least one row"),
    (_set("table", to={}), "table: got dict; it is a list of rows"),
    (_set("table", 0, to=1.0), "table row: got float; it is an object"),
    (_drop("table", 0, "start_tokens"), "table row: got no start_tokens; it has attention_factor, rescale"),
    (_set("table", 0, "lambda", to=1), "table row: got lambda; its keys are attention_factor, rescale"),
    (_drop("rope_theta"), "factors file: got no rope_theta; it has format, original_length"),
    (_set("extra", to=1), "factors file: got extra; its keys are format, model"),
    (_set("rope_theta", to="1e4"), f"rope_theta: got '1e4'; {NUMBER}"),
    (_set("original_length", to=0), "original_length: got 0; it is a whole number of at least 1"),
    (_set("model", to=3), "model: got int; it is a name"),
    (_set("provenance", to="search"), "provenance: got str; it is an object"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_a_wrong_file_is_refused_with_its_own_message(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "factors.json"
    path.write_text(json.dumps(changed(change)))  # json writes NaN and Infinity, as other tools do
    with pytest.raises(UserError) as error:
        FactorTable.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_json_that_is_no_object_is_refused(data: object) -> None:
    with pytest.raises(UserError, match=re.escape(f"format: got {type(data).__name__}; it is")):
        FactorTable.from_dict(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "factors.json, which is empty; it is JSON"),
        (b"  \n", "factors.json, which is empty; it is JSON"),
        (example().to_json().encode()[:-20], "; it is JSON; restore the file or make it again"),
        (b"[" * 100_000, "; it is JSON; restore the file or make it again"),
        (b"\xff\xfe\x00", "can't decode byte 0xff in position 0: invalid start byte); it is a readable text file"),
    ],
    ids=["empty", "blank", "truncated", "nested too deep", "binary"],
)
def test_a_broken_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        FactorTable.load(path)
    assert str(error.value).startswith(f"factors file: got {path}")
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["name,model\n4k,a\n", "1.0,1.5,4.25,8.0\n", "1.0\n"])
def test_of_a_csv_it_is_told_what_reads_one(content: str, tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        FactorTable.load(path)
    rule = "it is a factors.json, and a CSV does not say its model's RoPE"
    do = "convert it with longrope factors FILE --to json, and read that"
    assert str(error.value) == f"factors file: got {path}; {rule}; {do}"
    path.write_text(example().to_json())
    assert FactorTable.load(path) == example(), "whatever its name"


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere, which does not exist; it is a file; check the path"):
        FactorTable.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"Is a directory.*it is a readable text file"):
        FactorTable.load(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rope_theta": 10000.0}, "factors: got rope_theta 200; the model has rope_theta 10000; give the factors"),
        ({"rotary_dim": 16}, "factors: got rotary_dim 8; the model has rotary_dim 16; give the factors"),
        (
            {"original_length": 512},
            "original_length 256; the model has original_length 512; give the factors that were",
        ),
    ],
)
def test_factors_of_another_model_are_refused(model: dict[str, Any], message: str) -> None:
    own: dict[str, Any] = {"rope_theta": 200.0, "rotary_dim": 8, "original_length": 256}
    example().check_model(**own)
    with pytest.raises(UserError) as error:
        example().check_model(**own | model)
    assert message in str(error.value)


def test_a_large_theta_is_told_in_full() -> None:
    table = FactorTable(11158840.0, 2, 2**20, (unscaled(1, 2**20),))
    with pytest.raises(UserError, match="got rope_theta 11158840; the model has rope_theta 11158841;"):
        table.check_model(rope_theta=11158841, rotary_dim=2, original_length=2**20)
    with pytest.raises(UserError, match="got original_length 1048576; the model has original_length 1048577;"):
        table.check_model(rope_theta=11158840.0, rotary_dim=2, original_length=2**20 + 1)


@pytest.mark.parametrize(("length", "up_to"), [(1, 256), (255, 256), (256, 256), (257, 2048), (2048, 2048)])
def test_a_sequence_uses_the_first_row_that_reaches_its_length(length: int, up_to: int) -> None:
    assert example().row_for(length).up_to == up_to


def test_a_sequence_beyond_the_table_is_refused() -> None:
    with pytest.raises(UserError, match="got 2049 tokens; the factor table ends at 2048; use at most 2k tokens"):
        example().row_for(2049)
    assert example().lengths == [256, 2048]


def test_a_key_names_the_values_and_not_the_length() -> None:
    factors = RopeFactors(2048, (1.0, 2.5), start_tokens=4, attention_factor=1.1)
    assert factors.key == RopeFactors(4096, (1, np.float64(2.5)), 4, 1.1).key
    assert len(factors.key) == 16
    others: list[dict[str, Any]] = [
        {"rescale": (1.0, 2.51)},
        {"start_tokens": 0},
        {"attention_factor": 1.0},
        {"rescale": (1.0, 2.5, 1.0)},
    ]
    assert len({factors.key, *(factors.with_values(**other).key for other in others)}) == 5


def test_a_key_is_the_same_on_every_machine() -> None:
    assert unscaled(2, 256).key == "24bcd84d28585208"


def test_numpy_values_become_plain_numbers() -> None:
    factors = RopeFactors(np.int64(8), np.array([1.0, 2.0]), np.int32(1), np.float32(1.5))  # type: ignore[arg-type]
    assert factors == RopeFactors(8, (1.0, 2.0), 1, 1.5)
    assert json.loads(json.dumps(factors.to_dict())) == factors.to_dict()
    assert factors.vector.tolist() == [1.0, 2.0]


def test_a_change_is_checked_like_the_rest() -> None:
    with pytest.raises(UserError, match="attention_factor: got nan"):
        unscaled(2, 8).with_values(attention_factor=float("nan"))


@QUICK
@given(tables(), st.integers(1, 2**22))
def test_the_chosen_row_is_the_smallest_that_suffices(table: FactorTable, length: int) -> None:
    if length > table.rows[-1].up_to:
        with pytest.raises(UserError, match="the factor table ends at"):
            table.row_for(length)
    else:
        assert table.row_for(length).up_to == min(up_to for up_to in table.lengths if up_to >= length)
