"""analysis.ipynb on the tables that a night, or somebody else, can leave behind."""

import itertools
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from matplotlib.text import Text
from nbclient import NotebookClient

NOTEBOOK = nbformat.read(Path(__file__).parents[1] / "analysis.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"

# The baseline's mean is 1.81 and its spread 0.02, which is the noise. ccc gains 1.81 - 1.75 = 0.06;
# eee gains 0.05 more; ggg is kept because it is simpler, 0.01 worse than eee, and gains nothing;
# hhh gains 1.70 - 1.69 = 0.01, within the noise.
# ddd missed 1.75 by 0.01, iii 1.69 by 0.015: both within the noise. fff missed by 0.1: it did not.
NIGHT = HEADER + (
    "aaa\t1.800000\t2.0\tkeep\tbaseline, seed 42\n"
    "aaa\t1.820000\t2.0\tkeep\tbaseline, seed 43\n"
    "ccc\t1.750000\t2.5\tkeep\tdouble the matrix learning rate, seed 42\n"
    "ddd\t1.760000\t2.5\tdiscard\trotary base 200,000, seed 42\n"
    "bbb\t0.000000\t0.0\tcrash\tdepth 40, seed \n"
    "eee\t1.700000\t3.0\tkeep\thalf the batch, seed 42\n"
    "fff\t1.800000\t3.0\tdiscard\tlabel smoothing, seed 42\n"
    "ggg\t1.710000\t3.0\tkeep\tno value embeddings, seed 42\n"
    "hhh\t1.690000\t3.0\tkeep\tlonger warm-down, seed 42\n"
    "iii\t1.705000\t3.0\tdiscard\tmore decay, seed 42\n"
    "jjj\t9.000000\t3.0\tdiscard\ttwenty times the rate, seed 42\n"
)


@pytest.fixture
def analyse(tmp_path, monkeypatch):
    """Return a function that runs the notebook on tables and returns the notebook's variables."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")

    def run(*tables: str, picture: bool = False) -> dict:
        names = [f"{letter}/results.tsv" for letter in "abc"[: len(tables)]]
        for name, table in zip(names, tables, strict=True):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(table, encoding="utf-8")
        variables = {}
        for cell in CODE:
            if picture or not cell.id.startswith("plot"):
                source = cell.source
                if names:
                    source = source.replace('RESULTS = ["results.tsv"]', f"RESULTS = {names}")
                exec(compile(source, cell.id, "exec"), variables)
        return variables

    with matplotlib.rc_context():
        yield run
    plt.close("all")


def test_notebook_is_stored_without_outputs_and_runs_in_a_kernel(tmp_path, monkeypatch):
    nbformat.validate(NOTEBOOK)
    assert not any(cell.outputs or cell.execution_count for cell in CODE)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "results.tsv").write_text(NIGHT + "not a row\n", encoding="utf-8")
    notebook = nbformat.from_dict(NOTEBOOK)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, startup_timeout=300, resources=where).execute()
    printed = str([cell.get("outputs") for cell in notebook.cells])
    assert "val_bpb 1.8100 → 1.6900" in printed and "not a row" in printed
    assert plt.imread(tmp_path / "progress.png")[..., :3].std() > 0.01  # not blank


def test_figures_and_picture_are_those_worked_out_by_hand(analyse):
    found = analyse(NIGHT, picture=True)
    kept, missed = found["kept"], found["near_misses"]
    assert list(kept.commit) == ["aaa", "ccc", "eee", "ggg", "hhh"]
    assert list(kept.score) == pytest.approx([1.81, 1.75, 1.7, 1.71, 1.69])
    assert list(kept.gain) == pytest.approx([0, 0.06, 0.05, -0.01, 0.01])
    assert list(found["noise"]) == pytest.approx([0.02])
    assert list(kept.beyond_noise) == [True, True, True, False, False]
    assert [*missed.commit, *missed.miss] == ["ddd", "iii", *map(pytest.approx, (0.01, 0.015))]
    head, below = (text.get_text() for text in found["fig"].texts)
    how_far = "val_bpb 1.8100 → 1.6900 (6.6% less)"  # 0.12 / 1.81
    assert head.startswith(f"a: {how_far} · 11 runs, 5 kept, best #9\n")
    assert head.endswith("MORE than the noise: a gain of 0.1200 is 6.0 times 0.0200")
    assert "#3   -0.0600   double the matrix learning rate\n" in below
    assert "#9   -0.0100 ≈ longer warm-down\n" in below
    assert "#4   +0.0100   rotary base 200,000\n" in below
    names = {text.get_text() for text in found["fig"].legends[0].get_texts()}
    assert {"baseline", "best so far", "kept", "noise", "off the scale", "crashed"} < names
    low, high = found["axes"][0].get_ylim()
    assert low < 1.69 and 1.82 < high < 2  # jjj scored 9, bbb 0: they squash nothing


def test_the_mean_is_a_commits_score_and_its_last_row_the_verdict(analyse):
    found = analyse("aaa\t1.8\t2.0\tkeep\tbaseline\naaa\t1.7\t2.0\tkeep\tbaseline, again\n")
    assert [*found["kept"].score, *found["noise"]] == pytest.approx([1.75, 0.1])
    assert "\nNOT more than the noise: a gain of 0.0000" in found["heads"]
    rows = "a\t1.80\t2\tkeep\tbaseline\nb\t1.79\t2\tkeep\tidea\nb\t1.85\t2\tdiscard\tidea\n"
    found = analyse(rows)
    assert list(found["kept"].score) == [1.80]
    assert "a guess" not in found["heads"]
    assert "a guess: no commit was run twice" in analyse(rows[: rows.index("b")])["heads"]
    rows = "a\t1.80\t2\tkeep\tbaseline\nb\t1.79\t2\tdiscard\tidea\nb\t1.75\t2\tkeep\tidea\n"
    assert list(analyse(rows)["kept"].score) == pytest.approx([1.80, 1.77])


@pytest.mark.parametrize("table", [None, HEADER, "", NIGHT.replace("\tkeep\t", "\tcrash\t")])
def test_a_table_without_a_keep_is_no_error(analyse, capsys, table):
    found = analyse(*[table] * (table is not None), picture=True)
    assert "nothing kept yet" in found["fig"].texts[0].get_text() and found["malformed"].empty
    assert ("There is no results.tsv here" in capsys.readouterr().out) == (table is None)


def test_columns_go_by_their_names_and_further_ones_are_shown(analyse):
    found = analyse(
        "Kind\tdescription\tgain\tpeak_vram_mb\tstatus\tval_bpb\tcommit\thypothesis\n"
        "arch\tbaseline\t\t2048\tBASELINE\t1.8\taaa\t\n"
        "opt\thigher\trate\t9 %\t3072\t**Kept**\t1.7\tbbb\tfaster\n"  # one tab too many
        "opt\tdeeper\t-\t-\tcrashed\t-\t-\tdeeper\n"
        "opt\tlower\t-\t2048\treverted\t1.75\t-\n"  # a further column may be missing
        "opt\tless\t-\t2048\tDISCARD\t1.99\t-\n"  # two runs without a commit are no repeat
    )
    assert found["malformed"].empty and found["repeated"].empty
    assert list(found["runs"].status) == ["keep", "keep", "crash", "discard", "discard"]
    shown = found["show"](found["kept"], "gain").loc["a", 2]
    assert list(shown[["commit", "description", "peak_vram_mb"]]) == ["bbb", "higher rate", "3072"]
    assert list(shown[["kind", "hypothesis", "gain (table)"]]) == ["opt", "faster", "9 %"]
    assert shown["gain"] == pytest.approx(0.1)


def test_malformed_rows_are_set_aside_with_their_reasons_and_change_nothing(analyse):
    scores = ("about 1.5", "0.000000", "-1.500000", "nan", "inf")
    reasons = {f"xxx\t{score}\t2.0\tkeep\tidea": "val_bpb is not a score" for score in scores}
    reasons["xxx\t1.500000\t2.0\tmaybe\tidea"] = "unknown status"
    reasons["xxx\t1.500000\t2.0\tkeep"] = "no description"
    reasons["xxx 1.500000 2.0 keep spaces"] = "no val_bpb"
    found = analyse("\n".join([NIGHT, *reasons]))
    assert dict(zip(found["malformed"].row, found["malformed"].reason, strict=True)) == reasons
    assert "→ 1.6900 (6.6% less) · 19 runs, 5 kept, 8 malformed, best #9" in found["heads"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_quotes_tabs_dollars_and_windows_line_ends_harm_nothing(analyse):
    rows = 'k\t1.60\t2.0\tkeep\tan "open quote and $x^{ and \\frac\n'
    rows += "l\t1.50\t2.0\tkeep\ta stray\ttab, and\tanother\t1.2\n'm\t1.40\t2.0\tkeep\t*_<b>|`🙂\n"
    found = analyse("\ufeff" + (NIGHT + rows).replace("\n", "\r\n"), picture=True)
    assert found["malformed"].empty
    assert found["kept"].description.iloc[-2] == "a stray tab, and another 1.2"
    assert list(found["kept"].gain)[-3:] == pytest.approx([0.09, 0.1, 0.1])


def test_tables_stand_side_by_side_each_with_its_own_noise(analyse):
    found = analyse(NIGHT, NIGHT.replace("1.820000", "1.900000"), HEADER, picture=True)
    assert found["noise"].to_dict() == pytest.approx({"a": 0.02, "b": 0.1, "c": 0.001})
    scales = {ax.get_title(): ax.get_ylim() for ax in found["axes"]}
    assert scales == dict.fromkeys("abc", scales["a"])
    below = found["fig"].texts[1].get_text()
    assert "#3   -0.0600" in below and "#3   -0.1000" in below  # of b: 1.85 - 1.75


# A wave starts from the best before it: eee and fff both gain on bbb's 1.75, and ccc, which bbb
# beat, misses the baseline's 1.81 by -0.04. Of bbb's 0.06 only 0.045 held: 1.81 - 0.045 = 1.765.
WAVES = (
    HEADER[:-1]
    + "\twave\theld\n"
    + (
        "aaa\t1.800000\t2.0\tkeep\tbaseline, seed 42\t1\n"
        "aaa\t1.820000\t2.0\tkeep\tbaseline, seed 43\t1\n"
        "bbb\t1.750000\t2.0\tkeep\thalf the batch, seed 42\t2\t0.045\n"
        "ccc\t1.770000\t2.0\tdiscard\tmore decay, seed 42\t2\n"
        "ddd\t0.000000\t0.0\tcrash\tdepth 40, seed 42\t2\n"
        "bbb\t1.750000\t2.0\tkeep\thalf the batch, seed 43\t3\n"
        "eee\t1.700000\t2.0\tkeep\tlonger warm-down, seed 42\t3\n"
        "fff\t1.720000\t2.0\tkeep\tless code, seed 42\t3\n"
        "ggg\t1.710000\t2.0\tdiscard\trotary base 200,000, seed 42\n"
    )
)


@pytest.mark.parametrize("noted", [False, True])
def test_runs_of_a_wave_share_an_x_and_the_best_before_it(analyse, noted):
    table = WAVES
    if noted:  # at the end of the description, without the columns
        table = re.sub(r"\t(\d)(?=\t|\n)", r", wave \1", WAVES.replace("\twave\theld", ""))
        table = table.replace("\t0.045", ", held 0.045")
    found = analyse(table, picture=True)
    kept, missed = found["kept"], found["near_misses"]
    assert list(found["runs"].x) == [1, 1, 3, 3, 3, 6, 6, 6, 9]
    assert list(kept.commit) == ["aaa", "bbb", "eee", "fff"]
    assert list(kept.gain) == pytest.approx([0, 0.06, 0.05, 0.03])
    assert [*missed.commit, *missed.miss] == ["ccc", "ggg", *map(pytest.approx, (-0.04, 0.01))]
    assert "\nMeasured again: 0.0450 of 0.0600 holds" in found["heads"]
    assert "#3   -0.0600   (again -0.0450) half the batch\n" in found["fig"].texts[1].get_text()
    drawn = {line.get_label(): line.get_xydata().tolist() for line in found["axes"][0].lines}
    assert drawn["measured again"] == [pytest.approx([3, 1.765])]
    assert drawn["crashed"][0][0] == 3


@pytest.mark.parametrize("length", [1, 3, 20, 100, 126, 700])
def test_a_night_of_any_length_is_drawn_with_its_numbers_apart(analyse, length):
    rows = ""
    for run in range(length):  # waves of four, the first of each the best so far
        status, score = ("discard", 1.51) if run % 4 else ("keep", 1.5)
        rows += f"c{run}\t{score - run / 2000:.6f}\t2.0\t{status}\tidea {run}\t{run // 4}\n"
    found = analyse(HEADER[:-1] + "\twave\n" + rows, picture=True)
    assert list(found["kept"].x) == list(range(1, length + 1, 4))
    numbers = found["axes"][0].texts
    assert len(numbers) == min(16, len(found["kept"]))
    boxes = [Text.get_window_extent(number).expanded(1, 0.7) for number in numbers]  # of digits
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
