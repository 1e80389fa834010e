"""utils/config.py: config.yaml, overlays, key=value, --help; every mistake is one line that says what to do."""

import pytest

from conftest import ROOT
from utils.config import COMMON, help_text, load, parse
from utils.errors import UserError

TEXT = """\
unet:                 # the network
  channels: 32        # width
  mults: [1, 2]
  scales: [0.5, 1.0]
  dropout: 0.0

train:
  steps: 100          # how long
                      # (in steps)
  batch_size: 8
  lr: 2e-3            # learning rate
  warmup: 10
  resume: false       # go on
  note: ""

sample:
  n: 64               # images
  steps: 50

gpu:
  unet:
    channels: 128
  train:
    steps: 1000
    lr: 2e-4

quick:
  train:
    steps: 20

smoke:
  unet:
    channels: 4
  train:
    steps: 3
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "config.yaml").write_text(TEXT)
    return tmp_path / "config.yaml"


def error(path, *argv, section="train", **options):
    with pytest.raises(UserError) as info:
        load(path, section, argv, **options)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_values_and_common_keys(path):
    config = load(path, "train")
    assert config.train.lr == 2e-3 and isinstance(config.train.lr, float)
    assert config.train.seed == 0 and config.train.device == "auto" and config.train.runs == "runs"
    assert dict(config.unet) == dict(channels=32, mults=[1, 2], scales=[0.5, 1.0], dropout=0.0)
    assert set(COMMON) <= set(config.train.keys()) and not set(COMMON) & set(config.sample.keys())


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1E4", 1e4), ("-2e+3", -2e3), ("3", 3), ("0.5", 0.5),
                                         ("1_000", 1000), ("true", True), ("[1, 2e-1]", [1, 0.2]), ("e4", "e4")])
def test_numbers_are_read_as_people_write_them(text, value):
    assert parse(text) == value and type(parse(text)) is type(value)


def test_arguments(path):
    config = load(path, "train", ["lr=1e-4", "--steps=7", "channels=48", "unet.mults=[1,2,2]", "sample.steps=9",
                                  "--resume", "train.warmup=0", "dropout=1", "scales=[1]"])
    assert config.train.lr == 1e-4 and config.train.steps == 7 and config.unet.channels == 48
    assert config.unet.mults == [1, 2, 2] and config.sample.steps == 9 and config.train.resume is True
    assert config.train.warmup == 0
    assert config.unet.dropout == 1.0 and isinstance(config.unet.dropout, float)
    assert config.unet.scales == [1.0] and isinstance(config.unet.scales[0], float)
    assert load(path, "sample", ["steps=9"]).train.steps == 100       # a plain key is the script's own first


@pytest.mark.parametrize("text, value", [("007", "007"), ("1e5", "1e5"), ("true", "true"), ("a: [b", "a: [b"),
                                         ("'x y'", "x y"), ("", ""), ("a=b", "a=b")])
def test_text_stays_as_it_was_typed(path, text, value):
    assert load(path, "train", [f"note={text}"]).train.note == value


def test_overlays_from_left_to_right(path, capsys):
    assert load(path, "train", ["smoke=true"]).train.steps == 3
    assert load(path, "train", ["smoke=true", "steps=5"]).train.steps == 5
    assert load(path, "train", ["steps=5", "smoke=true"]).train.steps == 3
    both = load(path, "train", ["gpu=true", "--smoke"])
    assert both.train.steps == 3 and both.unet.channels == 4 and both.train.lr == 2e-4
    assert load(path, "train", ["smoke=true", "gpu=true"]).unet.channels == 128
    assert load(path, "train", ["quick=true"]).train.steps == 20
    assert load(path, "train", ["smoke=false"]).train.steps == 100
    assert not capsys.readouterr().out


def test_gpu_overlay_is_automatic_and_said(path, capsys):
    assert load(path, "train", ["steps=7"], cuda=True).train.steps == 7
    assert "gpu=false turns it off" in capsys.readouterr().out
    assert load(path, "train", [], cuda=True, quiet=True).unet.channels == 128
    assert load(path, "train", ["gpu=false"], cuda=True).unet.channels == 32
    assert load(path, "train", ["train.gpu=false"], cuda=True).unet.channels == 32
    assert load(path, "train", [], cuda=False).unet.channels == 32
    path.write_text(TEXT.replace("  batch_size: 8", "  batch_size: 8\n  gpu: false"))
    assert load(path, "train", [], cuda=True).unet.channels == 32
    assert not capsys.readouterr().out


@pytest.mark.parametrize("argument, nearest", [
    ("stepz=3", "steps"), ("batchsize=3", "batch_size"), ("chanels=3", "unet.channels"),
    ("unet.chanels=3", "unet.channels"), ("sead=1", "seed"), ("--resum", "resume"), ("sample.m=3", "sample.n")])
def test_an_unknown_key_names_the_nearest(path, argument, nearest):
    assert error(path, argument).endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize("argument, part", [
    ("zzzzzzzz=1", "--help lists all keys"),
    ("lr=fast", "lr takes a number (such as 0.002), not 'fast'"),
    ("lr=", "lr takes a number"),
    ("lr=[1]", "lr takes a number"),
    ("steps=1.5", "steps takes a whole number (such as 100), not 1.5"),
    ("steps=true", "steps takes a whole number"),
    ("resume=3", "resume takes true or false (such as false), not 3"),
    ("unet.mults=2", "mults takes a list (such as [1, 2]), not 2"),
    ("unet.mults=[1,a]", "mults takes a list"),
    ("unet.mults=[1.5]", "mults takes a list"),
    ("unet.mults=[1", "unet.mults=[1 is not readable"),
    ("lr={", "lr={ is not readable"),
    ("lr=\t", "is not readable"),
    ("lr=!!python/object/apply:os.getcwd []", "is not readable"),
    ("lr=1e999", "lr=inf must be a finite number"),
    ("lr=.nan", "lr=nan must be a finite number"),
    ("lr=0", "lr=0.0 must be above zero"),
    ("steps=0", "steps=0 must be above zero"),
    ("steps=-1", "steps=-1 must be above zero"),
    ("batch_size=0", "batch_size=0 must be above zero"),
    ("sample.n=0", "sample.n=0 must be above zero"),
    ("unet.channels=-4", "unet.channels=-4 must be above zero"),
    ("unet.dropout=-0.1", "unet.dropout=-0.1 must not be below zero"),
    ("threads=-1", "threads=-1 must not be below zero"),
    ("seed=-1", "seed=-1 must not be below zero"),
    ("seed=99999999999999999999", "must be below 2**53"),
    ("gpu=1", "gpu takes true, false or auto"),
    ("steps", "write arguments as key=value"),
    ("=3", "write arguments as key=value"),
    ("--", "write arguments as key=value")])
def test_a_bad_value_is_one_line(path, argument, part):
    assert part in error(path, argument)


@pytest.mark.parametrize("text, part", [
    ("train: [1\n", "is not readable at line 2, column 1"),
    ("train:\n  steps: 3\n lr: 4\n", "at line 3"),
    ("train:\n\tsteps: 3\n", "at line 2"),
    ("", "must hold sections"),
    ("- 1\n- 2\n", "must hold sections"),
    ("train: 3\n", "section train must hold lines"),
    ("train:\n  3: 4\n", "section train must hold lines"),
    ("smoke:\n  train: 3\n", "train in the section smoke"),
    ("smoke:\n  unet:\n    width: 3\n", "there is no key unet.width"),
    ("train:\n  steps: 5\nsmoke:\n  train:\n    steps: many\n", "steps takes a whole number"),
    ("train:\n  steps: ten\n", "steps must be a whole number, not 'ten'"),
    ("train:\n  steps:\n", "steps must be a whole number, not None"),
    ("train:\n  steps: 1e3\n", "steps must be a whole number, not 1000.0"),
    ("a: !!python/object/apply:os.getcwd []\n", "is not readable")])
def test_a_malformed_file_is_one_line(path, text, part):
    path.write_text(text)
    assert part in error(path, "smoke=true")


def test_a_missing_or_binary_file_is_one_line(path):
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error(path)
    path.unlink()
    assert "git checkout config.yaml" in error(path)


def test_help_lists_keys_with_their_comments(path, capsys):
    with pytest.raises(SystemExit) as stop:
        load(path, "train", ["lr=1", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python train.py key=value" in text
    for key, comment in (("steps=100", "how long"), ("lr=2e-3", "learning rate"), ("unet.channels=32", "width"),
                         ("device=auto", "auto, cpu or cuda"), ("quick=false", "a quick look"), ("", "(in steps)")):
        assert any(line.strip().startswith(key) and line.endswith(comment) or comment in line and key in line
                   for line in text.splitlines()), (key, comment)
    assert "n=64" not in text                          # another script's own key


@pytest.mark.parametrize("file", sorted(ROOT.glob("lesson_*/**/config.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_configurations_of_the_lessons(file):
    for section in ("train", "sample", "reproduce"):
        for argv in ([], ["smoke=true"], ["gpu=true"]):
            config = load(file, section, argv)
        for line in help_text(file, section).splitlines():
            key, equals, rest = line.strip().partition("=")
            if equals and line.startswith("  ") and " " not in key:
                assert len(line.split()) > 1, f"{file}, {section}: {key} has no comment"
    assert config.train.steps > 0


# ------------------------------------------------------------------ the whole way: exit codes of the scripts
def test_scripts_end_with_one_line_and_exit_code_2(launch, lesson):
    done = [(launch(lesson / script, *argv), part) for script, argv, part in (
        ("train.py", ["stepz=3"], "did you mean steps?"),
        ("train.py", ["lr=fast"], "lr takes a number"),
        ("train.py", ["batch_size=0"], "must be above zero"),
        ("train.py", ["device=tpu"], "must be auto, cpu or cuda"),
        ("train.py", ["precision=fp8"], "must be auto, fp32, bf16 or fp16"),
        ("train.py", ["device=cpu", "precision=fp16"], "needs a GPU"),
        ("train.py", ["smoke=true", "batch_size=60001"], "between 1 and 60000"),
        ("train.py", ["smoke=true", "unet.groups=3"], "divisible"),
        ("train.py", ["smoke=true", "ddpm.timesteps=1"], "must be at least 2"),
        ("train.py", ["smoke=true", "ddpm.predict=noize"], "is none of noise, mean"),
        ("sample.py", ["n=0"], "n=0 must be above zero"))]
    for process, part in done:
        assert part in process.error()
    for path in (lesson / "runs").glob("**/*"):
        assert path.is_dir(), path                     # nothing was begun that cannot be gone on with
    text = (lesson / "config.yaml").read_text()
    (lesson / "config.yaml").write_text(text.replace("train:", "train: ["))
    assert "is not readable at line" in launch(lesson / "train.py").error()
    (lesson / "config.yaml").write_text(text)
    helped = launch(lesson / "train.py", "--help")
    assert helped.wait() == 0 and "batch_size=" in helped.out and not helped.err
