from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.baselines import su_attention_factor, yarn_attention_factor
from longrope.convert import read_factors, to_csv
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors, unscaled
from tables import long_table, two_row_tables

QUICK = settings(max_examples=40, deadline=None, database=None)

MADE = [
    ("ft_a", "A-7B", 1024, 1024, "finetune", (1.0, 1.5, 4.0, 3.5)),  # falls at the end, as some published ones do
    ("short_a", "A-7B", 1024, 256, "recovery", (1.0, 1.25, 2.0, 2.5)),
    ("long_a", "A-7B", 1024, 4096, "second_interpolation", (1.0, 3.0, 16.0, 15.009999990463257)),
    ("ft_b", "B-7B", 2048, 2048, "finetune", (1.01, 2.0, 7.5, 8.0)),
]


def write_csv(path: Path, *lines: tuple[object, ...]) -> Path:
    out = io.StringIO()
    writer = csv.writer(out)
    header = ["name", "model", "finetuned_length", "evaluated_length", "kind"]
    writer.writerow([*header, *(f"lambda_{i}" for i in range(4))])
    writer.writerows([*line[:5], *line[5]] if isinstance(line[5], tuple) else line for line in lines)
    path.write_text(out.getvalue())
    return path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "published.csv", *MADE)


def read(path: Path, **options: Any) -> FactorTable:
    return read_factors(path, **{"rope_theta": 10000.0, "original_length": 256, **options})


def test_one_row_of_a_csv_is_put_above_the_base_model(published: Path) -> None:
    table = read(published, row="ft_a")
    expected = RopeFactors(1024, MADE[0][5], attention_factor=su_attention_factor(4.0, 256))
    assert table.rows == (unscaled(4, 256), expected)
    assert (table.rope_theta, table.rotary_dim, table.original_length, table.model) == (10000.0, 8, 256, "A-7B")


def test_a_row_for_the_original_length_stands_alone(published: Path) -> None:
    assert read(published, row="short_a").rows == (RopeFactors(256, MADE[1][5]),)


@pytest.mark.parametrize("row", ["A-7B@1024", "A-7B@1k"])
def test_the_rows_of_a_fine_tuned_model_become_one_table_by_length(published: Path, row: str) -> None:
    table = read(published, row=row)
    assert table.lengths == [256, 1024, 4096]
    assert [list(factors.rescale) for factors in table.rows] == [list(MADE[i][5]) for i in (1, 0, 2)]
    assert [factors.attention_factor for factors in table.rows] == [
        su_attention_factor(ratio, 256) for ratio in (1, 4, 16)
    ]


def test_the_attention_factor_of_a_csv_follows_the_rule(published: Path) -> None:
    last = [read(published, row="ft_a", attention=rule).rows[-1].attention_factor for rule in ("yarn", "none", "1.5")]
    assert last == [yarn_attention_factor(4.0), 1.0, 1.5]
    with pytest.raises(UserError, match="--attention-factor: got 'x'"):
        read(published, row="ft_a", attention="x")


def test_a_csv_of_one_row_needs_no_name(tmp_path: Path) -> None:
    table = read(write_csv(tmp_path / "one.csv", MADE[3]))
    assert [row.rescale for row in table.rows] == [(1.0,) * 4, MADE[3][5]]


def test_a_csv_of_several_rows_lists_them(published: Path) -> None:
    listed = "the file has the rows ft_a, short_a, long_a, ft_b and the models A-7B@1024, B-7B@2048; give the name of"
    for row, got in ((None, "none"), ("other", "'other'"), ("A-7B@2k", "'A-7B@2k'"), ("A-7B", "'A-7B'")):
        with pytest.raises(UserError) as error:
            read(published, row=row)
        assert str(error.value).startswith(f"--row: got {got}; {listed}")


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--row: got 2 rows called ft_b; the file has the rows ft_b and the models"):
        read(write_csv(tmp_path / "twice.csv", MADE[3], MADE[3]), row="ft_b")


def test_two_rows_of_a_model_for_one_length_are_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "twice.csv", MADE[3], ("again", *MADE[3][1:]))
    with pytest.raises(UserError, match=r"table: got up_to \[2048, 2048\]; rows ascend by up_to"):
        read(path, row="B-7B@2048")


@pytest.mark.parametrize(
    ("missing", "flag"), [("rope_theta", "--rope-theta"), ("original_length", "--original-length")]
)
def test_a_csv_needs_the_rope_of_its_model(published: Path, missing: str, flag: str) -> None:
    message = f"CSV of factors: got no {flag}; a CSV does not say which RoPE its factors are for; give {flag}"
    with pytest.raises(UserError, match=re.escape(message)):
        read(published, row="ft_a", **{missing: None})
    with pytest.raises(UserError, match=f"{flag}: got 0; it is a finite, positive number"):
        read(published, row="ft_a", **{missing: 0})


def test_a_csv_with_lengths_takes_no_other(published: Path) -> None:
    with pytest.raises(UserError, match="--up-to: got 512; this CSV says the lengths itself"):
        read(published, row="ft_a", up_to=512)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3.5", "nan", "CSV line 2, lambda_3: got 'nan'; it is a finite, positive number; correct the file"),
        ("3.5", "-3.5", "CSV line 2, lambda_3: got '-3.5'; it is a finite"),
        ("3.5", "inf", "CSV line 2, lambda_3: got 'inf'; it is a finite"),
        ("3.5", "", "CSV line 2, lambda_3: got ''; it is a finite"),
        ("3.5", "x", "CSV line 2, lambda_3: got 'x'; it is a finite"),
        (",3.5", "", "CSV line 2: got 8 columns; the header has 9"),
        ("3.5", "3.5,1", "CSV line 2: got 10 columns; the header has 9"),
        ("1024,1024", "1024,long", "length: got 'long'; a length is a positive whole number"),
        (
            "lambda_2",
            "lambda_7",
            "CSV header: got no lambda_2 in its place; the columns are name, model, finetuned_length",
        ),
        ("model,", "", "CSV header: got no model in its place"),
        (",lambda_0,lambda_1,lambda_2,lambda_3", "", "CSV header: got no lambda_0 in its place"),
        ("ft_a", '"ft_a', "published.csv, line 5 (unexpected end of data); it is JSON or CSV"),
        ("name,", "id,", "published.csv, which begins with 'id'; a CSV of factors has the columns name, model"),
    ],
)
def test_a_broken_csv_is_refused(published: Path, old: str, new: str, message: str) -> None:
    text = published.read_text()
    assert old in text
    published.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        read(published, row="ft_a")
    assert message in str(error.value)


def test_a_csv_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CSV: got a header alone; it has at least one row of factors"):
        read(write_csv(tmp_path / "none.csv"))


def test_the_bare_form_is_one_vector_for_every_layer(tmp_path: Path) -> None:
    path = tmp_path / "bare.csv"
    path.write_text("1.0,1.5,4.0\n" * 3)
    table = read(path, up_to=1024)
    expected = RopeFactors(1024, (1.0, 1.5, 4.0), attention_factor=su_attention_factor(4.0, 256))
    assert table.rows == (unscaled(3, 256), expected)
    assert table.rotary_dim == 6


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "1,2\n1,2\n\n1,2.5\n",
            {"up_to": 512},
            "CSV line 4: got other factors; one vector serves all layers, so every line",
        ),
        (
            "1,2\n1\n",
            {"up_to": 512},
            "CSV line 2: got other factors; one vector serves all layers, so every line equals",
        ),
        ("1,0\n", {"up_to": 512}, "CSV line 1, lambda_1: got '0'; it is a finite, positive number"),
        (
            "1,2\n",
            {},
            "got no --up-to; a CSV without a header does not say the length its factors are for; give --up-to",
        ),
        ("1,2\n", {"up_to": 512, "row": "a"}, "--row: got 'a'; a CSV without a header has no names; leave --row out"),
    ],
)
def test_a_bare_csv_that_says_too_little_or_too_much_is_refused(
    text: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bare.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert message in str(error.value)


@QUICK
@given(two_row_tables(), st.none() | st.sampled_from(["A-7B", 'odd, "name"', "user@host"]))
def test_a_table_survives_the_csv(
    tmp_path_factory: pytest.TempPathFactory, table: FactorTable, model: str | None
) -> None:
    rows = tuple(row.with_values(attention_factor=1.0) for row in table.rows)
    named = FactorTable(table.rope_theta, 32, table.original_length, rows, model)
    path = tmp_path_factory.mktemp("csv") / "factors.csv"
    path.write_text(to_csv(named))
    again = read_factors(
        path,
        row=f"{model or 'model'}@{rows[-1].up_to}",
        rope_theta=table.rope_theta,
        original_length=table.original_length,
        attention="none",
    )
    assert again.rows == rows
    assert to_csv(again) == path.read_text()


def test_a_csv_that_was_read_is_written_with_the_kinds_it_had(published: Path) -> None:
    lines = list(csv.reader(io.StringIO(to_csv(read(published, row="A-7B@1024")))))
    assert [line[:5] for line in lines[1:]] == [
        ["256_A-7B", "A-7B", "1024", "256", "recovery"],
        ["1k_A-7B", "A-7B", "1024", "1024", "finetune"],
        ["4k_A-7B", "A-7B", "1024", "4096", "second_interpolation"],
    ]


def test_attention_factors_that_a_csv_loses_are_told(caplog: pytest.LogCaptureFixture) -> None:
    rows = (RopeFactors(256, (1.0, 1.0)), RopeFactors(512, (1.0, 2.0), attention_factor=1.25))
    to_csv(FactorTable(10000.0, 4, 256, rows[1:]))
    assert caplog.messages == [], "one can be given when it is read"
    to_csv(FactorTable(10000.0, 4, 256, rows))
    assert [message.partition(":")[2].strip() for message in caplog.messages] == [
        "1, 1.25 are left out, and reading one gives all the same"
    ]


def test_start_tokens_are_never_lost_in_a_csv() -> None:
    table = FactorTable(10000.0, 4, 256, (RopeFactors(512, (1.0, 2.0), start_tokens=4),))
    with pytest.raises(UserError, match=re.escape("CSV: got start tokens [4]; a CSV has no column for them; keep")):
        to_csv(table)


# --- which form a file has ------------------------------------------------------------------------


def test_our_own_file_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("factors.json", "factors", "factors.txt"):
        long_table().save(tmp_path / name)
        assert read_factors(tmp_path / name) == long_table()


def test_a_file_that_disagrees_with_the_arguments_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    long_table().save(path)
    assert read_factors(path, rope_theta=10000.0, original_length=256) == long_table()
    with pytest.raises(UserError, match="factors: got rope_theta 10000; the model has rope_theta 500000;"):
        read_factors(path, rope_theta=500000.0)
    with pytest.raises(UserError, match="factors: got original_length 256; the model has original_length 512;"):
        read_factors(path, original_length=512)


BASE = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 4096}


def test_arguments_complete_a_config_and_do_not_contradict_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BASE))
    table = read_factors(path, rope_theta=500000.0, original_length=1024)
    assert (table.rope_theta, table.original_length) == (500000.0, 1024)
    for keys in ({"rope_theta": 300.0}, {"rope_parameters": {"rope_theta": 300.0}}):
        path.write_text(json.dumps(BASE | keys))
        with pytest.raises(UserError, match="got rope_theta 300; the model has rope_theta 500000"):
            read_factors(path, rope_theta=500000.0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.csv", " \n", "f.csv, which is empty; it is a factors.json, a config.json or a CSV of factors; restore"),
        ("f.json", "", "f.json, which is empty; it is a factors.json, a config.json or a CSV of factors; restore"),
        ("f.json", "1,2\n", "f.json (Extra data: line 1 column 2 (char 1)); it is JSON; restore the file"),
        ("f.txt", '{"format": ', "f.txt (Expecting value: line 1 column 12 (char 11)); it is JSON; restore"),
        ("f.json", "{}", 'factors: format: got format None; it is "longrope-factors"'),
        (
            "f.txt",
            "Once upon a time",
            "f.txt, which begins with 'Once upon a time'; a CSV of factors has the columns name",
        ),
    ],
)
def test_a_file_of_no_known_form_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_factors(path)
    assert message in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv, which does not exist; it is a file; check the path"):
        read_factors(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"row": "a"}, "--row"), ({"up_to": 512}, "--up-to"), ({"attention": "none"}, "--attention-factor")],
)
def test_flags_of_a_csv_are_refused_with_json(options: dict[str, Any], flag: str, tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    long_table().save(path)
    with pytest.raises(UserError, match=f"factors file: got {flag} for factors.json; .*; leave {flag} out"):
        read_factors(path, **options)


def test_reading_factors_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, longrope.convert; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
