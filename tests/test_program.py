"""Every command that program.md and README.md show is taken from them and run.

In a git repository of its own, by the shells that agents have, with a `uv` that plays a run and a
`sleep` that takes a thousandth of its time.
"""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import prepare
import train

ROOT = Path(train.__file__).parent
PROGRAM = (ROOT / "program.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """The fenced command blocks, without the indent of the list that they stand in."""
    found = re.findall(r"^( *)```sh\n(.*?)^ *```$", text, re.M | re.S)
    return [re.sub(f"^{indent}", "", block, flags=re.M) for indent, block in found]


def inline(text: str) -> list[str]:
    """What stands `between backticks`, outside the blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S))


def the_block(fragment: str) -> str:
    """program.md's one block that holds this fragment."""
    (block,) = (block for block in blocks(PROGRAM) if fragment in block)
    return block


def the_command(fragment: str) -> str:
    """program.md's one command within a sentence that holds this fragment."""
    (command,) = (span for span in inline(PROGRAM) if fragment in span)
    return command


FRAGMENTS = ["git checkout -b", "prepare.log", "git commit", 'eval "$(sed', "run() {", "record() {"]
FRAGMENTS += ["best=", "CUDA_VISIBLE"]
BRANCH, PREPARE, COMMIT, READ, RUN, RECORD, BEST, START = map(the_block, FRAGMENTS)
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"

FAKE_UV = """#!/bin/sh
echo "$*" >> "$CALLS"
[ "$2" = train.py ] || exit 0
echo "step     1 · loss 9.0110 · nice $(nice)"
here=$(dirname "$CALLS")
eval "PLAY=\\${PLAY_$CUDA_VISIBLE_DEVICES:-$PLAY} SCORE=\\${SCORE_$CUDA_VISIBLE_DEVICES:-$SCORE}"
case "$PLAY" in
  crash) echo "Traceback (most recent call last):"; echo "RuntimeError: boom" >&2; exit 1 ;;
  hang) exec "$REAL_SLEEP" 60 ;;
  slow) "$REAL_SLEEP" 1 ;;
  together) : > "$here/started $CUDA_VISIBLE_DEVICES"
    until [ "$(ls "$here" | grep -c '^started')" = 3 ]; do "$REAL_SLEEP" 0.01; done ;;
esac
cat << end
{SUMMARY}end
"""
SUMMARY = """---
val_bpb:          ${SCORE:-0.997900}
training_seconds: 300.1
total_seconds:    325.9
peak_vram_mb:     45060.2
mfu_percent:      39.80
total_tokens_M:   499.6
num_steps:        953
num_params_M:     50.3
depth:            8
benchmark:        1a2b3c4d
scale:            gpu
device:           NVIDIA H100 80GB HBM3
attention:        fa3
compiled:         yes
seed:             $SEED
train_loss:       2.9541
epoch:            1
tokens_per_second: 1660000
slow_share:       0.01
"""
FAKE_SLEEP = """#!/bin/sh
exec "$REAL_SLEEP" "$(echo "$1" | LC_ALL=C awk '{ print $1 / 1000 }')"
"""
FAKE_SBATCH = """#!/bin/sh
to=/dev/stdout
while [ $# -gt 0 ]; do
  case "$1" in -o) to=$2; shift ;; --wrap) sh -c "$2" >> "$to"; exit ;; esac
  shift
done
"""
FAKE_SRUN = """#!/bin/sh
while [ "$1" != "${1#-}" ]; do shift; done; exec "$@"
"""
FAKE_SKY = """#!/bin/sh
shift 6; "$@" 2>&1 | sed "s/^/$(printf '\\033[36m(task, pid=12)\\033[0m') /"
"""
ENDLESS = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
[ "$(grep -c "^$(basename "$0")" "$CALLS")" -lt 3 ] || kill "$PPID"
"""

# An agent's shell, and what `sh` is there: Debian's, Fedora's and macOS's.
SHELLS = [("dash", "dash"), ("bash", "bash"), ("zsh", "bash")]
SHELLS = [pair for pair in SHELLS if all(map(shutil.which, pair))] or [("sh", "sh")]


def inside(at: int, command: str) -> str:
    """A command with program.md's functions, in this folder (0) or in a worktree of a wave."""
    return READ + (f"(at {at}; {command.strip()})" if at else command)


class Night:
    """A repository with this project's files, and a shell in it."""

    def __init__(self, folder: Path, shell: str, sh: str):
        self.folder, self.shell, tools = folder / "lab", shell, folder / "tools"
        self.folder.mkdir()
        tools.mkdir()
        scripts = {
            "uv": FAKE_UV.replace("{SUMMARY}", SUMMARY),
            "sleep": FAKE_SLEEP,
            "sbatch": FAKE_SBATCH,
        }
        scripts |= {"srun": FAKE_SRUN, "sky": FAKE_SKY}
        scripts |= {"claude": ENDLESS, "codex": ENDLESS}
        for name, script in scripts.items():
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
        (tools / "sh").symlink_to(shutil.which(sh))
        self.calls_file = folder / "calls"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "PYTHON", "SEED"))},
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(folder),
            "REAL_SLEEP": shutil.which("sleep"),
            "CALLS": str(self.calls_file),
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        for name in ("train.py", "prepare.py", "program.md", "README.md", ".gitignore"):
            shutil.copy(ROOT / name, self.folder / name)
        self.git("init", "-q", "-b", "main")
        self.git("config", "user.email", "agent@example.com")
        self.git("config", "user.name", "agent")
        self.git("add", ".")
        self.git("commit", "-q", "-m", "Lay out the lab")

    def git(self, *args: str) -> str:
        return self.say(shlex.join(["git", *args]))

    def say(self, command: str, expected: int = 0, **environment: str) -> str:
        """Standard output of a command that an agent types."""
        places = dict(cwd=self.folder, env={**self.environment, **environment})
        streams = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        done = subprocess.run([self.shell, "-c", command], **places, **streams)
        assert done.returncode == expected, (command, done.stdout, done.stderr)
        said = re.sub("(Switched to a|Preparing worktree) .*|Terminated", "", done.stderr)
        assert not said.strip(), (command, done.stderr)
        return done.stdout

    def add_to(self, name: str, line: str = "# changed") -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def change(self, subject: str, at: int = 0, before: str = "") -> str:
        """An idea: edit train.py and commit it as program.md says; the commit's short name."""
        message = '"matrix learning rate 0.04 to 0.06"'
        assert message in COMMIT
        path = self.folder / (f"../lab-{at}/train.py" if at else "train.py")
        path.write_text(before + path.read_text("utf-8") + "# changed\n" * (not before), "utf-8")
        self.say(inside(at, COMMIT.replace(message, shlex.quote(subject))))
        return self.say(inside(at, "git rev-parse --short HEAD")).strip()

    def run(self, play: str = "score", score: str = "0.997900", seed: int = 42) -> list[str]:
        """Start a run, wait for it, and give the lines of run.log."""
        assert self.say(f"{READ}run {seed}", PLAY=play, SCORE=score) == ""
        return self.wait()

    def wait(self, at: int = 0) -> list[str]:
        for _ in range(300):
            shown = self.say(inside(at, "result"))
            if "\nexit status: " in shown:
                self.shown = shown
                log = self.folder / (f"../lab-{at}/run.log" if at else "run.log")
                return log.read_text(encoding="utf-8").splitlines()
        raise AssertionError(shown)

    def record(self, verdict: str = "keep", at: int = 0) -> str:
        return self.say(inside(at, f"record {verdict}"))

    def shorten_the_limit(self) -> None:
        path = self.folder / "program.md"
        path.write_text(PROGRAM.replace("+ 900", "- 260"), encoding="utf-8")

    def table(self) -> list[list[str]]:
        text = (self.folder / "results.tsv").read_text(encoding="utf-8")
        return [line.split("\t") for line in text.splitlines()]

    def set_up(self) -> "Night":
        self.say(BRANCH)
        self.say(PREPARE)
        return self


@pytest.fixture(params=SHELLS, ids=lambda pair: f"{pair[0]}, sh is {pair[1]}")
def night(request, tmp_path):
    return Night(tmp_path, *request.param).set_up()


# --- Set-up ---


def test_set_up_makes_the_branch_and_the_table_and_again_loses_no_row(night):
    branch = night.git("branch", "--show-current").strip()
    assert re.fullmatch(r"autoresearch/[a-z]{3}\d\d", branch)
    assert (night.folder / "results.tsv").read_text() == HEADER
    assert night.calls_file.read_text() == "run prepare.py\n"
    assert night.git("status", "--short") == ""  # git ignores the table
    night.run()
    night.record()
    night.say(PREPARE)
    assert len(night.table()) == 2


# --- A run ---


def test_a_run_outlives_the_shell_and_says_what_ran_and_how_it_ended(night):
    night.run()  # whose end is not taken for the next one's
    commit = night.change("wider")
    started_s = time.perf_counter()
    assert night.say(READ + "run 42", PLAY="slow") == ""
    assert time.perf_counter() - started_s < 0.9, "it waited for the run"
    assert "exit status" not in night.say(READ + "result")
    lines = night.wait()
    assert lines[:2] == [f"commit: {commit}", "seed: 42"]
    nice = f"nice {os.nice(0)}"  # zsh makes background jobs give way
    assert any(line.endswith(nice) for line in lines)
    assert night.calls_file.read_text().splitlines()[-1] == "run train.py"
    summary = SUMMARY.replace("${SCORE:-0.997900}", "0.997900").replace("$SEED", "42")
    assert night.shown == summary + "exit status: 0\n"
    # The shells of coding agents end commands after 120 s, and read all that one prints.
    turns, seconds = re.search(r"\[ \$n -lt (\d+) \].*sleep (\d+)", RUN).groups()
    assert int(turns) * int(seconds) <= 110
    (night.folder / "run.log").write_text("commit: 1234567\n" + "x" * 100_000 + "\n")
    assert len(night.say(READ + "result")) <= 250


def test_a_run_that_gives_no_sign_of_life_for_minutes_has_died(night):
    """Before, an agent watched the log for ten minutes of a run that ended with its predecessor."""
    log = night.folder / "run.log"
    log.write_text("commit: 1234567\nseed: 42\n")
    assert night.say(READ + "result") == "seed: 42\n"
    os.utime(log, (time.time() - 130,) * 2)
    assert night.say(READ + "result").endswith("exit status: died\n")
    night.say(READ + "run 42", PLAY="slow")  # it is silent for a second, and touches its log
    while "nice" not in log.read_text():
        pass
    os.utime(log, (1, 1))
    while log.stat().st_mtime == 1:
        pass
    assert "exit status" not in log.read_text()


def test_only_what_is_committed_runs_also_of_a_benchmark_that_the_person_chose(night):
    refused = "commit train.py, undo the rest\n"
    for name in ("train.py", "prepare.py", "uv.lock", "helper.py"):  # some untracked
        night.add_to(name)
        assert night.say(READ + "run 42") == refused
        night.git("add", name)
        assert night.say(READ + "run 42") == refused
        assert not (night.folder / "run.log").exists()
        night.git("reset", "-q", "--hard")
    night.add_to("prepare.py", 'DATASET = "pysource"')
    night.say(the_command(" prepare.py"))
    assert night.run()[-1] == "exit status: 0"


LIMIT = r"\$\((awk .*? prepare\.py)\)"


def test_a_run_that_hangs_is_ended_15_minutes_beyond_the_budget(night):
    path, (limit,) = night.folder / "prepare.py", re.findall(f"limit={LIMIT}", RUN)
    text = path.read_text(encoding="utf-8")
    for budget_s in (60, 3600, prepare.TIME_BUDGET):
        changed = re.sub(r"(?m)^TIME_BUDGET = \d+", f"TIME_BUDGET = {budget_s}", text)
        path.write_text(changed, encoding="utf-8")
        assert night.say(f"sh -c '{limit}'") == f"{budget_s + 900}\n"
    night.git("checkout", "-q", "prepare.py")
    night.shorten_the_limit()
    assert night.run("hang")[-1] == "exit status: 143"  # 128 + SIGTERM
    night.record()
    assert night.table()[-1][1:4] == ["0.000000", "0.0", "crash"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="asks Linux")
def test_a_run_leaves_no_process_behind(night):
    night.run()
    find = ["bash", "-c", f"grep -lzsFx CALLS={night.calls_file} /proc/[0-9]*/environ"]
    for _ in range(50):
        left = subprocess.run(find, capture_output=True, text=True).stdout
        if not left:
            return
        time.sleep(0.01)
    raise AssertionError(left)


# --- The table ---


def test_rows_come_from_the_log_and_from_git_and_stand_in_plain_git_log(night):
    kept = night.change("matrix learning rate 0.04 to 0.06")
    night.run(score="0.991234")
    shown = night.record("keep")
    night.run(score="0.992345", seed=43)
    night.record("keep")
    odd = """quotes ' and " and 100 % \\n and $HOME"""
    discarded = night.change(odd)
    night.run(score="1.000000")
    night.record("discard")
    crashed = night.change("a\ttab")
    night.run("crash")
    assert "val_bpb" not in night.shown
    assert "RuntimeError: boom\nexit status: 1\n" in night.shown
    night.change("deeper")  # the row is of the commit that ran
    night.record("keep")  # a slip: there is no score
    header, *rows = night.table()
    assert header == HEADER.strip().split("\t")
    assert rows == [
        [kept, "0.991234", "44.0", "keep", "matrix learning rate 0.04 to 0.06, seed 42"],
        [kept, "0.992345", "44.0", "keep", "matrix learning rate 0.04 to 0.06, seed 43"],
        [discarded, "1.000000", "44.0", "discard", f"{odd}, seed 42"],
        [crashed, "0.000000", "0.0", "crash", "a tab, seed 42"],
    ]
    lines = ["\t".join(row) for row in rows]
    assert shown == f"{lines[0]}\n"
    for commit, own in ((kept, lines[:2]), (discarded, lines[2:3]), (crashed, lines[3:])):
        _, notes = night.git("log", "-1", commit).split("Notes:\n")
        assert [line.strip() for line in notes.splitlines() if "\t" in line] == own
        assert notes.count("tokens_per_second: 1660000") == (own[0].count("\tcrash\t") < 1) * len(
            own
        )


def test_a_locale_with_a_comma_changes_nothing(night):
    night.environment |= {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"}
    folder, command = night.folder.parent, ["localedef", "-i", "de_DE", "-f", "UTF-8"]
    if shutil.which("localedef"):
        made = subprocess.run([*command, str(folder / "de_DE.UTF-8")], capture_output=True)
        night.environment |= {"LOCPATH": str(folder)} if made.returncode < 2 else {}
    command = ["bash", "-c", "printf '%.1f' 0,5"]
    if subprocess.run(command, env=night.environment, capture_output=True).stdout != b"0,5":
        pytest.skip("no locale with a decimal comma here")
    night.run(score="0.991234")
    night.record()
    assert night.table()[-1][1:3] == ["0.991234", "44.0"]


# --- Keep or drop ---


def test_an_experiment_and_its_drop_touch_train_py_alone_and_lose_nothing(night):
    before = night.git("rev-parse", "HEAD").strip()
    (night.folder / "README.md").write_text("the person's unfinished thought")
    (night.folder / "notes.txt").write_text("staged")
    night.git("add", "notes.txt")
    night.change("wider")
    night.add_to("train.py", "# mended")
    night.say(the_command("--amend"))
    assert night.git("show", "--name-only", "--format=%s", "HEAD").split() == ["wider", "train.py"]
    dropped = night.git("rev-parse", "--short", "HEAD").strip()
    night.run()
    night.record("discard")
    night.say(READ + "drop")
    assert night.git("rev-parse", "HEAD").strip() == before
    assert (night.folder / "train.py").read_text() == (ROOT / "train.py").read_text()
    assert night.git("status", "--short").splitlines() == [" M README.md", "A  notes.txt"]
    assert (night.folder / "README.md").read_text() == "the person's unfinished thought"
    (kept,) = night.git("for-each-ref", "--format=%(refname)", "refs/experiments/").split()
    assert kept == f"refs/experiments/{dropped}"
    log = night.git("log", "-1", kept)
    assert "wider" in log and "discard" in log
    assert night.table()[-1][0] == dropped  # the table is not git's


def test_a_new_agent_sees_a_night_under_way_and_dropped_ideas_and_every_command_runs(night):
    dropped = night.change("wider")
    night.run()
    night.record("discard")
    night.say(READ + "drop")
    night.change("deeper")
    shown = night.say(the_command("git status --short;"))
    for sign in ("* autoresearch/", "deeper", dropped, "discard", "exit status: 0"):
        assert sign in shown
    night.run()
    night.record()
    found = night.say(the_command("git log --oneline --b"))
    assert "wider" in found and "deeper" in found and "Notes" not in found
    starts = ("git ", "cat ", "tail ", "grep ", "ls ", "uv ")
    commands = [span for span in inline(PROGRAM) if span.startswith(starts)]
    assert len(commands) >= 5
    for command in filter(
        lambda command: "COMMIT" not in command, commands
    ):  # `git commit --amend` and `git diff` of nothing are no failures
        night.say(f"{{ {command}; }} 2> /dev/null || [ $? = 1 ]")


# --- Waves ---


@pytest.fixture
def wave(night):
    """Three worktrees at a baseline of two rows, 0.9979, and an idea in each."""
    night.say(the_command("--allow-empty"))
    for seed in (42, 43):
        night.run(seed=seed)
        night.record()
    (night.folder / ".venv").mkdir()
    night.say(READ + BEST)
    edits = {"wider": "", "deeper": "# deeper\n", "longer": "# longer\n"}
    night.ideas = [night.change(name, n, edits[name]) for n, name in enumerate(edits, start=1)]
    return night


def test_a_wave_runs_at_once_and_its_winner_becomes_the_branch_after_a_second_seed(wave):
    plays = {f"PLAY_{n}": "together" for n in range(3)}
    wave.say(READ + START, **plays, SCORE_0="0.990000", SCORE_1="0.991000", SCORE_2="1.100000")
    for n, commit in enumerate(wave.ideas, start=1):
        lines = wave.wait(at=n)
        assert lines[:2] == [f"commit: {commit}", "seed: 42"] and lines[-1] == "exit status: 0"
        assert (wave.folder / f"../lab-{n}/.venv").resolve() == wave.folder / ".venv"
    command = " & ".join(f"(at {n}; record discard > /dev/null 2>&1)" for n in (1, 2, 3))
    wave.say(f"{READ}{command} & wait")
    rows = wave.table()[3:]
    assert sorted(row[0] for row in rows) == sorted(wave.ideas)
    assert {(len(row), row[3]) for row in rows} == {(5, "discard")}
    wave.say(inside(3, "drop"))
    wave.change("taller", at=3, before="# taller\n")
    wave.say(READ + BEST)  # moves nothing that is newer than the best
    wave.say(READ + START.replace("42", "43"), SCORE_0="0.990200", SCORE_1="0.991000")
    for n, verdict in ((1, "keep"), (2, "discard"), (3, "discard")):
        assert wave.wait(at=n)[1] == "seed: 43"
        assert f"\t{verdict}\t" in wave.record(verdict, at=n)
    first, second, _ = wave.ideas
    wave.say(the_command("git merge").replace("COMMIT", first))
    for n in (2, 3):
        wave.say(inside(n, "drop"))
    wave.say(READ + BEST)
    heads = {wave.say(inside(n, "git rev-parse --short HEAD")).strip() for n in range(4)}
    assert heads == {first}
    kept = wave.git("for-each-ref", "--format=%(subject)", "refs/experiments/").split()
    assert sorted(kept) == ["deeper", "longer", "taller"]
    pick = the_command("git cherry-pick").replace("COMMIT", second)
    assert "deeper" in wave.say(inside(2, pick))
    assert wave.git("status", "--short") == ""


def test_a_crash_and_a_hang_in_a_wave_harm_no_other_run(wave):
    wave.shorten_the_limit()
    wave.say(READ + START, PLAY_0="crash", PLAY_1="hang", SCORE_2="0.990000")
    assert [wave.wait(at=n)[-1][-3:].strip() for n in (1, 2, 3)] == [": 1", "143", ": 0"]
    for n in (1, 2, 3):
        wave.record("discard", at=n)
    statuses = [(row[0], row[3]) for row in wave.table()[3:]]
    assert statuses == list(zip(wave.ideas, ["crash", "crash", "discard"], strict=True))
    for n in (1, 2):
        wave.say(inside(n, "drop"))
    wave.say(READ + BEST)
    heads = [wave.say(inside(n, "git rev-parse --short HEAD")).strip() for n in range(4)]
    assert heads == [heads[0]] * 3 + wave.ideas[2:]
    assert len(wave.git("for-each-ref", "refs/experiments/").splitlines()) == 2


@pytest.mark.parametrize("tool", ["srun", "sbatch", "sky"])
def test_a_clusters_command_leaves_the_same_log_as_one_machine(night, tool):
    night.say(READ + the_command(f'run 42 "{tool}'))
    lines = night.wait()
    assert lines[1] == "seed: 42" and lines[-1] == "exit status: 0"
    assert "\t0.997900\t44.0\tkeep\t" in night.record()


def test_what_an_agent_that_died_in_a_wave_left_is_found_and_lost_by_no_command(wave):
    wave.say(READ + "(at 2; run 42)", SCORE="0.990000")
    wave.wait(at=2)  # and was never recorded
    (wave.folder / "../lab-1/run.log").write_text(f"commit: {wave.ideas[0]}\nseed: 42\n")
    wave.say(inside(3, "drop"))
    wave.add_to("../lab-3/train.py", "# half an idea")
    shown = wave.say(the_command("git worktree list;"))
    assert all(f"/lab-{n} " in shown for n in (1, 2, 3))
    wave.say(READ + BEST)
    for n, commit in enumerate(wave.ideas[:2], start=1):
        assert wave.say(inside(n, "git rev-parse --short HEAD")).strip() == commit
    os.utime(wave.folder / "../lab-1/run.log", (1, 1))
    assert wave.say(inside(1, "result")).endswith("exit status: died\n")
    wave.say(READ + "(at 1; run 42)")
    wave.wait(at=1)
    assert [wave.record("discard", at=n)[:7] for n in (1, 2)] == wave.ideas[:2]
    assert (wave.folder / "../lab-3/train.py").read_text().endswith("# half an idea\n")
    assert wave.say(inside(3, "run 42")) == "commit train.py, undo the rest\n"
    wave.say(inside(3, "git commit -q -m 'unfinished half' train.py; drop"))
    subjects = wave.git("for-each-ref", "--format=%(subject)", "refs/experiments/")
    assert sorted(subjects.splitlines()) == ["longer", "unfinished half"]


# --- The two files as texts ---

# GNU's alone: macOS has other forms of these, or none.
GNU_ONLY = (
    r"\btimeout\b|\bsetsid\b|\bnproc\b|\btac\b|\bseq\b|\bflock\b|\breadlink -f|\brealpath\b|"
    r"sed -i|sed -r|date -d|date --|grep -P|grep .*--[a-z]|stat -c|head -n -|head -c|tail --|"
    r"sort -V|xargs -r|cp --|mktemp --|echo -e|\[\[|<\(|&>|\bdeclare\b|\blocal\b|<<<|\bmd5sum\b|"
    r"\bsha256sum\b|sleep \d+[smh]|\bawk -i|print -P|\bfree\b|watch |column -"
)


@pytest.mark.parametrize("block", blocks(README), ids=lambda block: block[:20])
@pytest.mark.parametrize("shell", sorted({shell for shell, _ in SHELLS}))
def test_every_block_of_the_readme_runs(block, shell, tmp_path):
    night = Night(tmp_path, shell, "sh")
    # The third call ends the shell that runs the loop: this one, or one that `sbatch` starts.
    night.say(block, expected={"while ": -15, "sbatch": 143}.get(block[:6], 0))
    calls = night.calls_file.read_text() if night.calls_file.exists() else ""
    for tool, prefix in (("uv", ""), ("claude", "claude "), ("codex", "codex ")):
        starts = len(re.findall(rf"^\s*{tool} ", block, re.M))
        assert len(re.findall(f"^{prefix}", calls, re.M)) >= starts, calls


def test_uv_commands_name_what_exists():
    commands = re.findall(r"uv run (?:--with \S+ )?([^\n`#>&;|}\"']+)", PROGRAM + README)
    tools = {"jupyter", *(path.name for path in Path(sys.executable).parent.iterdir())}
    assert commands
    for first, *others in map(str.split, commands):
        assert first in tools or first.endswith(".py"), first
        files = [word for word in (first, *others) if word.endswith((".py", ".ipynb"))]
        assert all((ROOT / file).exists() for file in files), files


OUTPUTS = {"results.tsv", "run.log", "progress.png"}
ELSEWHERE = {"CUDA_VISIBLE_DEVICES", "AUTORESEARCH_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HEAD"}


@pytest.mark.parametrize("text", [PROGRAM, README], ids=["program.md", "README.md"])
def test_every_name_in_the_texts_exists_and_no_command_is_for_linux_alone(text):
    spans = inline(text)
    commands = [*blocks(text), *(span for span in spans if " " in span)]
    assert [c for c in commands if re.search(GNU_ONLY, c)] == []
    code = (ROOT / "prepare.py").read_text() + (ROOT / "train.py").read_text()
    for span in spans:
        for name in re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b|^[A-Z]{4,}\b(?= =|$)", span):
            known = hasattr(train, name) or hasattr(prepare, name) or name in ELSEWHERE
            assert known and (name in code or name in ELSEWHERE), name
        if re.fullmatch(r"[\w.-]+\.(py|md|ipynb|tsv|log|png|toml|lock)", span):
            assert span in OUTPUTS or (ROOT / span).exists(), span
        if span.startswith("--"):
            assert f'"{span.split()[0]}"' in code, span
        if re.fullmatch(r"[a-z]+(_[a-z]+)+|climbmix|tinystories|pysource", span):
            assert span in code, span
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"results.tsv", "run.log"} <= set(ignored)


def test_the_summary_has_the_names_that_program_md_reads():
    names = {"val_bpb", "slow_share", "tokens_per_second", "scale", "device", "attention"}
    names |= {"compiled", "train_loss", "epoch"}
    assert names <= set(inline(PROGRAM))
    printed = re.findall(r"^(\w+): ", inspect.getsource(train.summarize), re.M)
    assert names | set(re.findall(r'of\["(\w+)"\]', RECORD)) - {"commit"} <= set(printed)
    assert printed == re.findall(r"^(\w+): ", SUMMARY, re.M)  # `result` shows its 21 last lines


def test_the_two_files_are_small_and_between_the_scales_only_numbers_differ():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("prepare.py", "train.py")]
    lines = [text.count("\n") for text in texts]
    assert lines[0] <= 1117 and lines[1] <= 1065, lines  # law 9 wants 820 and 800
    assert len(PROGRAM.encode()) <= 9500
    numbers = re.findall(r"^([A-Z_]+) = (?:scale\(|.* if _CUDA else )", "".join(texts), re.M)
    assert {"DATASET", "DEPTH"} <= set(numbers) and len(numbers) <= 15, numbers


def test_dependencies_come_from_the_standard_index_alone():
    lock = (ROOT / "uv.lock").read_text()
    sources = set(re.findall(r"^source = (.*)$", lock, re.M))
    assert sources == {'{ registry = "https://pypi.org/simple" }', '{ virtual = "." }'}
    files = {address.split("/")[2] for address in re.findall(r'\burl = "(.*?)"', lock)}
    assert files == {"files.pythonhosted.org"}
    project = (ROOT / "pyproject.toml").read_text()  # names no second index, file or repository
    assert not re.search(r"https?://|git\+|file:|\[tool\.uv|\[\[", project)


# --- The real thing, once ---

REAL_UV = """#!/bin/sh
[ "$2" = train.py ] && exec "$PYTHON" "$WRAPPER"
"""
WRAPPER = """
import os, sys
sys.path.insert(0, {root!r})
import prepare, train
prepare.DATASET, prepare.VOCAB_SIZE, prepare.EVAL_TOKENS = {text!r}, 400, 64 * 32
prepare.MAX_SEQ_LEN = train.MAX_SEQ_LEN = 32
prepare.TIME_BUDGET = train.TIME_BUDGET = 2
small = dict(DEPTH=2, ASPECT_RATIO=16, HEAD_DIM=16, TOTAL_BATCH_SIZE=512, DEVICE_BATCH_SIZE=8)
small |= dict(HUNG_AFTER_S=120)
for name, value in small.items():
    setattr(train, name, value)
train.GPT.compile = lambda self: None  # takes a minute here
if os.environ["PLAY"] == "nan":
    train.RESIDUAL_START = float("nan")
train.main()
"""


def test_a_real_run_from_an_empty_cache_is_read_and_recorded(tmp_path, own_text):
    night = Night(tmp_path, *SHELLS[0]).set_up()
    (tmp_path / "tools" / "uv").write_text(REAL_UV)
    # Not a thousandth of the time that the run may take, but a twentieth.
    (tmp_path / "tools" / "sleep").write_text(FAKE_SLEEP.replace("1000", "20"))
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format(root=str(ROOT), text=str(own_text)))
    night.environment |= {"AUTORESEARCH_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    night.environment |= {"PYTHON": sys.executable, "WRAPPER": str(wrapper)}
    night.say(the_command("--allow-empty"))
    baseline = night.git("rev-parse", "--short", "HEAD").strip()
    lines = night.run("score", seed=43)
    log = (night.folder / "run.log").read_bytes()
    assert lines[-1] == "exit status: 0", log.decode()
    assert len(log) < 8192 and b"\r" not in log
    assert any("is not prepared yet" in line for line in lines)
    read = dict(line.split(":", 1) for line in night.shown.split("---\n")[1].splitlines())
    assert lines[0] == f"commit: {baseline}" and int(read["num_steps"]) > 1
    night.record()
    row = night.table()[-1]
    assert row[0] == baseline and row[1] == read["val_bpb"].strip() and 0 < float(row[1]) < 8
    assert row[2] == f"{float(read['peak_vram_mb']) / 1024:.1f}"
    assert row[3:] == ["keep", "baseline, seed 43"]

    lines = night.run("nan")  # from what is prepared now
    assert lines[-2:] == ["error: loss nan at trial step 0", "exit status: 1"]
    assert not any("prepared" in line or line == "---" for line in lines)
    night.record()
    assert night.table()[-1] == [baseline, "0.000000", "0.0", "crash", "baseline, seed 42"]
