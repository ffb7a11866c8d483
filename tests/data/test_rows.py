import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_agentrl_jax.data.prompts import read_tasks
from open_agentrl_jax.data.rows import BadRow, Table, decode, read_table, resolve, write_parquet
from open_agentrl_jax.types import UserError


def number(row, file, i):
    if "n" not in row:
        raise BadRow("no n")
    return row["n"]


def jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_bad_rows_are_named_by_file_and_number_skipped_and_counted(tmp_path, caplog):
    rows = [{"n": i} for i in range(300)]
    rows[6], rows[99], rows[199] = {"m": 1}, "{truncated", "[1, 2]"
    file = jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        table = read_table(file, number)
    assert list(table) == [i for i in range(300) if i not in (6, 99, 199)]
    assert [s.split(": ")[0] for s in table.skipped] == [f"{file} row {i}" for i in (7, 100, 200)]
    assert "no n" in table.skipped[0] and "not JSON" in table.skipped[1] and "list" in table.skipped[2]
    assert "skipped 3 of 300 rows" in caplog.text and f"{file} row 7" in caplog.text


@pytest.mark.parametrize(
    ("total", "bad", "fine"), [(10, 1, True), (10, 2, False), (300, 3, True), (300, 4, False), (2, 1, True)]
)
def test_more_than_one_percent_is_an_error_but_a_single_row_never(tmp_path, total, bad, fine):
    file = jsonl(tmp_path / "a.jsonl", [{}] * bad + [{"n": 1}] * (total - bad))
    if fine:
        assert len(read_table(file, number)) == total - bad
    else:
        with pytest.raises(UserError, match=rf"{bad} of {total} rows are bad.*a\.jsonl row 1: no n") as e:
            read_table(file, number)
        assert "\n" not in str(e.value)


def test_nothing_to_read_is_an_error_of_one_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "only.jsonl").write_text("{}\n")
    (tmp_path / "text.csv").write_text("a,b\n")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "broken.json").write_text("[1,")
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "empty.parquet")
    for name, reason in {
        "empty.jsonl": "empty",
        "only.jsonl": "empty .*row 1",
        "empty.parquet": "empty",
        "text.csv": "suffix",
        "object.json": "list of objects",
        "broken.json": "not JSON",
        "folder": "holds no",
        "missing.jsonl": "is not there",
        "no/such/path": "is not there",
    }.items():
        with pytest.raises(UserError, match=reason) as e:
            read_table(tmp_path / name, number)
        assert name in str(e.value) and "\n" not in str(e.value)


def test_a_truncated_parquet_is_an_error(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, [{"n": i} for i in range(1000)])
    whole = file.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
            read_table(file, number)


GOOD = '{"problem": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"prompt": "p", "reward_model": "' + b"[" * 100_000 + b'"}',
        b'{"problem": "\xff", "answer": "1"}',
        b'{"problem": "\\ud800", "answer": "1"}',
        b'{"question_content": "q", "public_test_cases": "[1]"}',
        b'{"question_content": "q", "private_test_cases": [{"input": ["a"], "output": "b"}]}',
        b'{"question_content": "q", "private_test_cases": [{"inp": 1}]}',
    ],
)
def test_a_bad_row_of_any_kind_is_one_bad_row(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line + b"\n" + GOOD.encode() * 3)
    table = read_tasks(path)
    assert (len(table), len(table.skipped)) == (3, 1) and "row 1" in table.skipped[0]


def test_a_byte_order_mark_and_dos_lines_are_no_part_of_the_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() * 2)
    (tmp_path / "y.json").write_bytes(b"\xef\xbb\xbf[" + GOOD.encode() + b"]")
    assert len(read_tasks(tmp_path)) == 3 and not read_tasks(tmp_path).skipped


def test_damage_inside_a_file_is_an_error_of_one_line(tmp_path):
    text = pa.array([b"\xff\xfe"], pa.binary()).buffers()
    bad = pa.Array.from_buffers(pa.string(), 1, text)
    pq.write_table(pa.table({"problem": bad, "answer": ["1"]}), tmp_path / "x.parquet")
    (tmp_path / "y.json").write_text("[" * 100_000)
    for name in ("x.parquet", "y.json"):
        with pytest.raises(UserError, match=name) as caught:
            read_tasks(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_all_kinds_of_file_and_a_folder_of_them(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"n": 1}])
    (tmp_path / "b.json").write_text(json.dumps([{"n": 2}, {"n": 3}]))
    write_parquet(tmp_path / "deep" / "c.parquet", [{"n": 4}])
    (tmp_path / "README.md").write_text("not data")
    assert list(read_table(tmp_path, number)) == [1, 2, 3, 4]
    assert [f.name for f in resolve(tmp_path)] == ["a.jsonl", "b.json", "c.parquet"]


def test_a_hub_id_is_fetched_and_its_absence_is_an_error(tmp_path, monkeypatch):
    import huggingface_hub

    jsonl(tmp_path / "train.jsonl", [{"n": 5}])
    asked = []

    def download(repo, **options):
        asked.append((repo, options["revision"], options["repo_type"]))
        if repo == "who/gone":
            raise OSError("404 Client Error\nmore")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert list(read_table("who/set@v2", number)) == [5]
    assert asked == [("who/set", "v2", "dataset")]
    with pytest.raises(UserError, match="who/gone is neither") as e:
        read_table("who/gone", number)
    assert "\n" not in str(e.value)


def test_writing_is_all_or_nothing(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, [{"n": 1}])
    with pytest.raises(Exception, match="int"):
        write_parquet(file, [{"n": 1}, {"n": "text"}])
    assert pq.read_table(file).to_pylist() == [{"n": 1}]
    assert [f.name for f in tmp_path.iterdir()] == ["a.parquet"]
    with pytest.raises(UserError, match="no row"):
        write_parquet(file, [])


def test_decode_reads_json_columns_and_leaves_text_alone():
    assert decode('[{"role": "user"}]') == [{"role": "user"}]
    assert decode("[1, 2)") == "[1, 2)" and decode("5") == "5" and decode(None) is None


def test_a_table_is_a_list():
    assert Table([1, 2]) == [1, 2] and Table([1]).skipped == []
