"""utils/config.py: config.yaml, overlays, key=value, --help; every mistake is one line that says what to do."""

import pytest

from conftest import ROOT
from utils import bounds
from utils.config import (
    COMMON,
    KINDS,
    OVERLAYS,
    QUICK,
    SCRIPTS,
    TRAIN,
    _set,
    help_text,
    load,
    parse,
    read,
    read_bounds,
)
from utils.errors import UserError

TEXT = """\
unet:                 # the network
  channels: 32        # >=1: width
  mults: [1, 2]
  widths: [1, 2]      # [>=1]: of each level
  scales: [0.5, 1.0]
  shares: [1, 0.5]    # [0.0..1.0]: of each part
  dropout: 0.0        # >=0.0 <1.0: share left out
  kind: vp            # vp|sub-vp|"": the process
  sigma: auto         # auto|>0.0: the largest noise
  low: -20.0          # any: lowest log-SNR
  rate: 1             # >0.0: a number that is written without a point
  scale: 1.0          # >0.0 if kind=vp|sub-vp or deep: of the process
  deep: false         # true|false: more layers

train:
  steps: 100          # >=1: how long
                      # (in steps)
  batch_size: 8       # >=1: images
  lr: 2e-3            # >0.0: learning rate
  warmup: 10
  resume: false       # go on
  note: ""            # text: what you like

sample:
  n: 64               # >=1: images
  steps: 50           # >=1 unless solver=free: of the sampler
  solver: fixed       # fixed|free: of the equation
  labels: ""          # text unless guidance=0: digits
  guidance: 1.0       # any unless labels=none: how much
  out: samples.png    # the picture

gpu:
  unet:
    channels: 128     # >=1000: a comment of an overlay is no bound
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
    assert dict(config.unet) == dict(channels=32, mults=[1, 2], widths=[1, 2], scales=[0.5, 1.0], shares=[1, 0.5],
                                     dropout=0.0, kind="vp", sigma="auto", low=-20.0, rate=1.0, scale=1.0, deep=False)
    assert isinstance(config.unet.rate, float)         # its bound says that it is one
    assert set(COMMON) <= set(config.train.keys()) and not set(COMMON) & set(config.sample.keys())


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1E4", 1e4), ("-2e+3", -2e3), ("3", 3), ("0.5", 0.5),
                                         ("1_000", 1000), ("true", True), ("[1, 2e-1]", [1, 0.2]), ("e4", "e4")])
def test_numbers_are_read_as_people_write_them(text, value):
    assert parse(text) == value and type(parse(text)) is type(value)


def test_arguments(path):
    config = load(path, "train", ["lr=1e-4", "--steps=7", "channels=48", "unet.mults=[1,2,2]", "sample.steps=9",
                                  "--resume", "train.warmup=0", "dropout=0", "scales=[1]", "sigma=2",
                                  "rate=0.5", "kind=", "shares=[0, 0.25]"])
    assert config.train.lr == 1e-4 and config.train.steps == 7 and config.unet.channels == 48
    assert config.unet.mults == [1, 2, 2] and config.sample.steps == 9 and config.train.resume is True
    assert config.train.warmup == 0
    assert config.unet.dropout == 0.0 and isinstance(config.unet.dropout, float)
    assert config.unet.sigma == 2.0 and isinstance(config.unet.sigma, float) and config.unet.rate == 0.5
    assert config.unet.kind == "" and config.unet.shares == [0, 0.25]
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
    assert load(path, "train", cuda=True, quiet=True).train.gpu is True and load(path, "train").train.gpu == "auto"
    assert load(path, "train", ["train.gpu=false"], cuda=True).unet.channels == 32
    assert load(path, "train", [], cuda=False).unet.channels == 32
    for cpu in (["device=cpu"], ["train.device=cpu"], ["--device=cpu", "steps=7"]):      # a GPU that is not to be used
        assert load(path, "train", cpu, cuda=True).unet.channels == 32
    assert load(path, "train", ["device=cuda"], cuda=True, quiet=True).unet.channels == 128
    assert load(path, "train", ["device=cpu", "gpu=true"], cuda=True).unet.channels == 128
    path.write_text(TEXT.replace("  warmup: 10", "  warmup: 10\n  gpu: false"))
    assert load(path, "train", [], cuda=True).unet.channels == 32
    assert not capsys.readouterr().out


def test_a_claim_is_the_same_on_every_device_unless_the_reader_asks(path):
    path.write_text(TEXT + "\nreproduce:\n  seeds: 3  # >=1: trainings\n", encoding="utf-8")
    assert load(path, "reproduce", [], cuda=True).unet.channels == 32
    assert load(path, "reproduce", ["gpu=true"], cuda=True).unet.channels == 128


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
    ("lr=1e999", "lr must be finite, not infinite"),
    ("lr=.nan", "lr must be finite, not nan"),
    ("lr=" + "9" * 400, "lr must be finite"),
    ("steps=" + "9" * 400, "steps must be finite"),
    ("scales=[1.0, .inf]", "scales must be finite"),
    ("shares=[1.0, .nan]", "shares must be finite"),
    ("low=.nan", "low must be finite"),
    ("sigma=.inf", "sigma must be finite"),
    ("lr=0", "lr must be a number above 0.0, not 0.0"),
    ("steps=0", "steps must be a whole number of at least 1, not 0"),
    ("steps=-1", "steps must be a whole number of at least 1, not -1"),
    ("sample.n=0", "n must be a whole number of at least 1, not 0"),
    ("unet.channels=-4", "channels must be a whole number of at least 1, not -4"),
    ("unet.dropout=-0.1", "dropout must be a number of at least 0.0 and below 1.0, not -0.1"),
    ("unet.dropout=1", "dropout must be a number of at least 0.0 and below 1.0, not 1.0"),
    ("widths=[1, 0]", "widths must be a list of whole numbers of at least 1, not [1, 0]"),
    ("shares=[1.5]", "shares must be a list of numbers from 0.0 to 1.0, not [1.5]"),
    ("shares=[a]", "shares takes a list"),
    ("kind=ve", 'kind must be vp, sub-vp or "", not \'ve\''),
    ("sigma=-1", "sigma must be auto or a number above 0.0, not -1"),
    ("sigma=large", "sigma must be auto or a number above 0.0, not 'large'"),
    ("sigma=[1.0]", "sigma must be auto or a number above 0.0, not [1.0]"),
    ("sigma=true", "sigma must be auto or a number above 0.0, not True"),
    ("threads=-1", "threads must be a whole number from 0 to 1024, not -1"),
    ("seed=-1", "seed must be a whole number of at least 0 and below 9e15, not -1"),
    ("seed=99999999999999999999", "and below 9e15"),
    ("device=tpu", "device must be auto, cpu, cuda or mps, not 'tpu'"),
    ("device=3", "device must be auto, cpu, cuda or mps, not 3"),
    ("precision=fp8", "precision must be auto, fp32, bf16 or fp16, not 'fp8'"),
    ("gpu=maybe", "gpu must be true, false or auto, not 'maybe'"),
    ("gpu=1", "gpu must be true, false or auto, not 1"),
    ("steps=1000000001", "steps must be at most 1000000000"),
    ("sample.n=1000000000000", "n must be at most 1000000000"),
    ("widths=[1, 1000000001]", "widths must be at most 1000000000"),
    ("deep=3", "deep takes true or false (such as false), not 3"),
    ("debug=maybe", "debug takes true or false"),
    ("lr=&a [*a]", "is not readable: an alias (&, *) puts one value in two places"),
    ("unet.mults=" + "[" * 5000, "is not readable"),
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
    ("train:\n  steps: ten  # >=1: x\n", "config.yaml: train.steps must be a whole number of at least 1, not 'ten'"),
    ("train:\n  steps:  # >=1: x\n", "train.steps must be a whole number of at least 1, not None"),
    ("train:\n  steps: 1e3  # >=1: x\n", "train.steps must be a whole number of at least 1, not 1000.0"),
    ("train:\n  steps: [3]  # >=1: x\n", "train.steps must be a whole number of at least 1, not [3]"),
    ("train:\n  steps: 3  # [>=1]: x\n", "train.steps must be a list of whole numbers of at least 1, not 3"),
    ("train:\n  steps: .inf\n", "train.steps must be finite, not infinite"),
    ("sample:\n  n: 0  # >=1: x\n", "sample.n must be a whole number of at least 1, not 0"),
    ("train:\n  device: tpu\n", "train.device must be auto, cpu, cuda or mps, not 'tpu'"),
    ("train:\n  n: 5  # >=1: x\nsmoke:\n  train:\n    n: 0\n",
     "config.yaml, section smoke: n must be a whole number of at least 1, not 0"),
    ("train:\n  steps: 3\n  lr: 4\n  steps: 5\n", "at line 4, column 3: there are two steps; correct it"),
    ("train:\n  steps: 3\ntrain:\n  steps: 5\n", "at line 3, column 1: there are two train; correct it"),
    ("a: &a [1, *a]\n", "at line 1, column 4: an alias (&, *) puts one value in two places; correct it"),
    ("a: &a {b: *a}\n", "an alias"),
    ("a: &a\n  b: 1\nc: *a\n", "at line 1, column 4: an alias"),
    ("a: &a {b: 1}\nc: {<<: *a}\n", "an alias"),
    ("a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(40)), "an alias"),
    ("train:\n  publish: maybe\n", "train.publish must be true or false, not 'maybe'"),
    ("train:\n  publish: \"false\"\n", "train.publish must be true or false, not 'false'"),
    ("train:\n  resume: 3\n", "train.resume must be true or false, not 3"),
    ("train:\n  runs: [a]\n", "train.runs must be text, not ['a']"),
    ("train:\n  kinds: [a, 3]  # [text]: x\n", "train.kinds must be a list of texts, not ['a', 3]"),
    ("a: !!python/object/apply:os.getcwd []\n", "is not readable")])
def test_a_malformed_file_is_one_line(path, text, part):
    path.write_text(text)
    assert part in error(path, "smoke=true")


def test_text_that_yaml_takes_for_something_else(path):
    path.write_text("sample:\n  labels: 7  # text: digits\n  gif:\n  npz: yes\n  out: 1.5\n")
    config = load(path, "sample")
    assert (config.sample.labels, config.sample.gif, config.sample.npz, config.sample.out) == ("7", "", "true", "1.5")


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
    for key, comment in (("steps=100", ">=1: how long"), ("lr=2e-3", ">0.0: learning rate"),
                         ("unet.channels=32", ">=1: width"), ("device=auto", "auto|cpu|cuda|mps: what computes"),
                         ("unet.sigma=auto", "auto|>0.0: the largest noise"), ("quick=false", "a quick look"),
                         ("", "(in steps)")):
        assert any(line.strip().startswith(key) and line.endswith(comment) or comment in line and key in line
                   for line in text.splitlines()), (key, comment)
    assert "n=64" not in text                          # another script's own key


# ------------------------------------------------------------------ bounds
@pytest.mark.parametrize("text, words, inside, outside", [
    (">=1", "a whole number of at least 1", [1, 10**20], [0, 1.0, True, "1", None, [1]]),
    (">0.0", "a number above 0.0", [1e-9, 3], [0, 0.0, -1.0, False, ""]),
    (">=0.0 <1.0", "a number of at least 0.0 and below 1.0", [0, 0.99], [1, 1.0, -0.1]),
    (">=0 <9e15", "a whole number of at least 0 and below 9e15", [0, 9 * 10**15 - 1], [-1, 9 * 10**15, 0.5]),
    ("0.0..1.0", "a number from 0.0 to 1.0", [0, 1, 0.5], [-0.01, 1.01]),
    ("-60..-30", "a whole number from -60 to -30", [-60, -30], [-61, -29, -40.0]),
    ("any", "a number", [-5, 0.1], ["any", None, True]),
    ("vp|sub-vp", "vp or sub-vp", ["vp", "sub-vp"], ["", "ve", 1]),
    ('a|""', 'a or ""', ["a", ""], ['""']),
    ("true|false|auto", "true, false or auto", [True, False, "auto"], [1, 0, None]),
    ("auto|>0.0", "auto or a number above 0.0", ["auto", 1, 0.5], [0, "1", True]),
    ("[>=1]", "a list of whole numbers of at least 1", [[], [1, 2]], [1, [0], [1, 1.0], ["a"]]),
    ("true|false", "true or false", [True, False], ["true", "false", 1, 0, None]),
    ("text", "text", ["", "a b"], [1, None, ["a"], True]),
    ("[text]", "a list of texts", [[], ["a", ""]], ["a", [1], [["a"]]]),
    (">=1 if a=b|c or d", "a whole number of at least 1", [1], [0]),
    ("text unless a=-1.5", "text", ["x"], [1]),
    ("[>=1]2", "a list of 2 whole numbers of at least 1", [[1, 2]], [[], [1], [1, 2, 3], [1, 0]]),
    ("[any]2+ if a", "a list of 2 or more numbers", [[1, 2], [0.5] * 9], [[], [1], ["a", "b"]]),
    ("[text]1+", "a list of 1 or more texts", [["a"]], [[], "a"]),
    ("[x|y]", "a list of x or y", [[], ["y", "x"]], ["x", ["z"]])])
def test_the_notation_of_bounds(text, words, inside, outside):
    bound, rest = bounds.split(f"{text}: what: it is")
    assert str(bound) == words and rest == "what: it is"
    assert [value for value in inside if not bound.holds(value)] == []
    assert [value for value in outside if bound.holds(value)] == []


@pytest.mark.parametrize("comment", [
    "images", "", "0: none", "auto: all", '"": your newest', "seed, of everything", "a | b: c", ">=: x", ">=1", ">=1 x",
    ">=1 if: x", ">=1 when a: x", "texts: x", "text if (a): x", "0.0..: x", "x [>=1]: y", "[>=1]+: x", ">=1 2: x",
    "[]: x", "any", "vp|: x", "(>=1): x", "1: none; >=1: x"])
def test_other_comments_are_no_bounds(comment):
    assert bounds.split(comment) == (None, comment)


@pytest.mark.parametrize("argv, part", [
    (["steps=9", "solver=free"], "steps=9: steps has no effect with solver=free: leave one of the two out"),
    (["sample.steps=50", "solver=free"], "sample.steps=50: steps has no effect with solver=free"),
    (["labels=3", "guidance=0"], "labels=3: labels has no effect with guidance=0: leave one of the two out"),
    (["labels=none", "--guidance=2"], "guidance=2: guidance has no effect with labels=none"),
    (["scale=2", "kind="], "scale=2: scale has an effect only with kind=vp or sub-vp or deep: set that, or leave scale "
                           "out"),
    (["solver=free"], ""), (["steps=9"], ""), (["labels=3", "guidance=1e-3"], ""), (["guidance=0"], ""),
    (["scale=2"], ""), (["scale=2", "kind=sub-vp"], ""), (["scale=2", "kind=", "deep=true"], ""), (["kind="], ""),
    (["labels=none"], "")])
def test_a_value_without_an_effect_is_refused_if_it_was_given(path, argv, part):
    if part:
        assert part in error(path, *argv, section="sample")
    else:
        load(path, "sample", argv)


FILES = sorted(ROOT.glob("lesson_*/**/config.yaml"))


def numeric(value):
    """Whether a value of a config.yaml is a number or a list of numbers."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in items)


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_every_value_of_a_lesson_has_a_bound_and_keeps_to_it(file):
    values, bound = read(file), read_bounds(file)
    overlays = {name: values.pop(name, {}) for name in OVERLAYS}
    numbers = [(target, key) for target in values for key in values[target] if numeric(values[target][key])]
    assert len(numbers) > 20
    assert [f"{target}.{key}" for target in values for key in values[target] if (target, key) not in bound] == []
    for (target, key), one in bound.items():           # a condition names keys of its section
        named = [part.partition("=")[0] for part in one.condition.partition(" ")[2].split(" or ") if part]
        assert set(named) <= {*values.get(target, ()), *COMMON}, f"{target}.{key}: {one.condition}"
    for (target, key), one in bound.items():           # of the file's own values, and of what overlays lay over them
        for value in [keys[target][key] for keys in (values, *overlays.values()) if key in keys.get(target, ())]:
            assert one.holds(value), f"{target}.{key}={value} must be {one}"
    assert values["train"]["steps"] > 0
    for target, key in numbers:                        # whatever the key: one line for what is no such number
        for value in (float("nan"), -float("inf"), "text", None, {}, [float("nan")], ["text"], [[1]]):
            with pytest.raises(UserError) as info:
                _set({target: dict(values[target])}, target, key, value, bound[target, key], "here")
            assert "\n" not in str(info.value) and key in str(info.value)


def test_bounds_in_code_are_those_of_keys_of_every_script():
    keys = {key for _, key in read_bounds(FILES[0])}
    assert {"seed", "threads", "device", "precision", "gpu"} <= keys
    code = "".join((ROOT / "utils" / name).read_text(encoding="utf-8") for name in ("config.py", "bounds.py"))
    for file in FILES:                                 # no lesson's hyper-parameter is named there
        for target, keys in read(file).items():
            for key in keys if target not in OVERLAYS else ():
                known = f'"{key}"' not in code or key in COMMON | QUICK | KINDS | TRAIN
                assert known, f"utils/config.py names {target}.{key}"


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_configurations_of_the_lessons(file):
    for section in SCRIPTS:
        for argv in ([], ["smoke=true"], ["gpu=true"], ["quick=true"] * ("quick" in read(file))):
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
        ("train.py", ["batch_size=0"], "must be a whole number of at least 1, not 0"),
        ("train.py", ["device=tpu"], "must be auto, cpu, cuda or mps"),
        ("train.py", ["precision=fp8"], "must be auto, fp32, bf16 or fp16"),
        ("train.py", ["beta2=.nan"], "beta2 must be finite, not nan"),
        ("train.py", ["variance=wide"], "variance must be large or small, not 'wide'"),
        ("train.py", ["device=cpu", "precision=fp16"], "needs a GPU"),
        ("train.py", ["smoke=true", "batch_size=60001"], "between 1 and 60000"),
        ("train.py", ["smoke=true", "unet.groups=3"], "divisible"),
        ("train.py", ["ddpm.timesteps=1"], "timesteps must be a whole number from 2 to 1000000, not 1"),
        ("train.py", ["smoke=true", "unet.mults=[1, 2, 2, 2, 2]"], "cannot be"),
        ("sample.py", ["n=0"], "n must be a whole number of at least 1, not 0"))]
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
