"""`Run`: what every script needs and no paper talks about.

Configuration, device, precision, seed, processes, the folder of a run, logging, checkpoints, exact resume. The
training loop itself stays in the lesson. Plain `python`, `torchrun` and `accelerate launch` all work.
"""

import io
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from .config import OVERLAYS, Section, load
from .device import auto_precision, device_name, peak_memory_mb
from .errors import UserError, disk_error
from .files import ROOT, atomic, lock, write_json
from .syntax import code_hash

FORMAT = "zero-to-hero checkpoint 1"
FREE = ("runs", "publish", "resume", "preview_every", "save_every", "log_every")   # may change on --resume


class Run:
    """One run of a lesson's script.

    file: the script's __file__; its folder is the lesson, its name the section of config.yaml.
    argv: key=value arguments (default: the command line).
    """

    def __init__(self, file, argv=None):
        self.lesson, self.script = Path(file).resolve().parent, Path(file).stem
        self.name = lesson_name(self.lesson)
        self.code = code_hash(self.lesson, self.script)             # now: the files may change while this runs
        self.argv = list(sys.argv[1:] if argv is None else argv)
        self.folder, self.step, self._lock = None, 0, None
        self._resumed, self._tracked, self._records = None, {}, []
        cuda = torch.cuda.is_available()
        self.config = load(self.lesson / "config.yaml", self.script, self.argv, cuda)
        self.settings = self.config[self.script]       # this script's own section
        try:
            if self.script == "train" and getattr(self.settings, "resume", False):
                argv = self._resume()
                self.config = load(self.lesson / "config.yaml", self.script, argv, cuda, quiet=True)
                self.settings = self.config[self.script]
                self._check_resumed()
            self._start_processes(cuda)
        except BaseException:
            self._release()
            raise
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        torch.manual_seed(self.settings.seed)          # the same on every rank: the same first weights

    # ------------------------------------------------------------------ device and processes
    def _start_processes(self, cuda):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        wanted = self.settings.device
        if wanted not in ("auto", "cpu", "cuda"):
            raise UserError(f"device={wanted} must be auto, cpu or cuda")
        if wanted == "cuda" and not cuda:
            raise UserError("device=cuda: no CUDA GPU was found; leave device out to use the CPU")
        cpu = wanted == "cpu" or not cuda
        precision = self.settings.precision
        if precision == "auto":
            precision = auto_precision("cpu" if cpu else "cuda")
        if precision not in ("fp32", "bf16", "fp16"):
            raise UserError(f"precision={precision} must be auto, fp32, bf16 or fp16")
        if precision == "fp16" and cpu:
            raise UserError("precision=fp16 needs a GPU; use bf16 or fp32")
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            AcceleratorState._reset_state(True)        # one process may run several scripts (a notebook, the tests)
        # Without cpu=True, torchrun on a machine without a GPU would train separate models without a word.
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no" if precision == "fp32" else precision)
        self.device, self.precision = self.accelerator.device, precision
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if int(os.environ.get("WORLD_SIZE", 1)) != self.world:
            raise UserError(f"{os.environ['WORLD_SIZE']} processes were started, but {self.world} work together")

    @property
    def is_main(self):
        return self.rank == 0

    def prepare(self, *objects):
        """Networks and optimizers for training on this device and these processes; other modules are moved.

        From here on every process draws its own noise.
        """
        warnings.filterwarnings("ignore", "Grad strides do not match")     # several processes; costs nothing here
        ready = []
        for item in objects:
            if isinstance(item, torch.nn.Module) and not any(p.requires_grad for p in item.parameters()):
                ready.append(item.to(self.device))
            else:
                ready.append(self.accelerator.prepare(item))
        torch.manual_seed(self.settings.seed + 1_000_003 * self.rank)
        return ready[0] if len(ready) == 1 else tuple(ready)

    def place(self, *modules):
        """Modules for sampling: on the device, in evaluation mode, in this run's precision."""
        ready = tuple(self.accelerator.prepare_model(m.to(self.device).eval(), evaluation_mode=True)
                      if any(True for _ in m.parameters()) else m.to(self.device).eval() for m in modules)
        return ready[0] if len(ready) == 1 else ready

    def backward(self, loss):
        """loss.backward(), scaled where fp16 needs it."""
        self.accelerator.backward(loss)

    def clip_grad_norm(self, parameters, bound):
        """Scale the gradients down to this norm if they are longer."""
        return self.accelerator.clip_grad_norm_(parameters, bound)

    def generator(self, offset=0):
        """A CPU generator of this run's seed, for noise that must not depend on the device or on the training."""
        return torch.Generator().manual_seed(self.settings.seed + offset)

    def say(self, text):
        """Print once, however many processes there are."""
        if self.is_main:
            print(text, flush=True)

    # ------------------------------------------------------------------ the run's folder
    def _runs(self):
        """The folder of this script's runs: `runs` in the lesson, or an absolute path; smoke and quick ones aside."""
        aside = "smoke" if self.settings.smoke else "quick" if getattr(self.settings, "quick", False) else ""
        return self.lesson / self.settings.runs / aside

    def open_folder(self, name=None):
        """Make (or take) the folder of this run and hold it: a number of its own for every training."""
        if self.folder:
            return self.folder
        if self.is_main:
            runs = self._runs()
            runs.mkdir(parents=True, exist_ok=True)
            if name:
                self.folder = runs / name
                self.folder.mkdir(exist_ok=True)
            else:
                number = 1 + max([int(p.name) for p in numbered(runs)], default=0)
                while True:                            # two trainings may start at once: mkdir decides
                    try:
                        self.folder = runs / f"{number:03d}"
                        self.folder.mkdir()
                        break
                    except FileExistsError:
                        number += 1
                self._hold()
        if self.world > 1:
            from accelerate.utils import broadcast_object_list

            self.folder = Path(broadcast_object_list([str(self.folder)])[0])
        return self.folder

    def _hold(self):
        self._lock = lock(self.folder / ".lock", wait=False)
        if not self._lock.__enter__():
            raise UserError(f"{self.folder} is being trained by another process: wait for it to end, "
                            "or start a new run without --resume")

    def _release(self):
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

    # ------------------------------------------------------------------ training
    def track(self, **objects):
        """Name what a checkpoint holds (networks, optimizer, EMA). Loads it now if this run resumes one."""
        self._tracked = {name: item for name, item in objects.items() if item is not None}
        if self._resumed is None:
            return
        saved = self._resumed
        try:
            if len(saved["random"]) != self.world:
                raise UserError(f"{self.folder} was trained by {len(saved['random'])} processes, not {self.world}: "
                                "start as many, or train anew without --resume")
            for name, item in self._tracked.items():
                try:
                    _bare(item).load_state_dict(saved["states"][name])
                except (KeyError, RuntimeError, ValueError) as error:
                    raise UserError(f"the checkpoint in {self.folder} does not fit: {str(error).splitlines()[0]}; "
                                    "train anew without --resume") from None
        except UserError:
            self._release()
            raise
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step, self._seconds_before = saved["step"], saved["seconds"]
        self._records = [tuple(record) for record in saved.get("records", [])]
        torch.set_rng_state(saved["random"][self.rank])
        if self.device.type == "cuda" and saved["random_cuda"]:
            torch.cuda.set_rng_state(saved["random_cuda"][self.rank])
        self.say(f"resumed {self.folder.name} after step {self.step}")

    _seconds_before = 0.0

    def steps(self, data):
        """Yield (step, (x0, labels)) up to config's `steps`, on this device; saves and stops between steps.

        Each process gets its own slice of every batch, so `batch_size` is that of the whole.
        """
        if data.batch_size % self.world:
            raise UserError(f"batch_size={data.batch_size} must be a multiple of the {self.world} processes")
        total, log_every = self.settings.steps, getattr(self.settings, "log_every", 50)
        self.open_folder()
        self._begin_log()
        self.say(f"training {self.name} on {device_name(self.device)}, {self.precision}, {total} steps of "
                 f"{data.batch_size} -> {self.folder}")
        self._start, self._waited = time.perf_counter(), 0.0
        try:
            with self._signals(), self._progress(total) as bar:
                while self.step < total:
                    before = time.perf_counter()
                    batch = tuple(part.to(self.device) for part in data.batch(self.step, self.rank, self.world))
                    self._waited += time.perf_counter() - before
                    yield self.step, batch
                    self.step += 1
                    bar.update()
                    if self.step % log_every == 0 or self.step == total:
                        self._flush(bar)
                    stop = self._stop_wanted(log_every)
                    save_every = getattr(self.settings, "save_every", 0)
                    if stop or save_every and self.step % save_every == 0 and self.step < total:
                        self.save()
                    if stop:
                        raise Stopped(f"stopped and saved after step {self.step}; go on with: {self._again()}")
        except BaseException:                          # a notebook keeps the exception, and with it this object
            self._release()
            raise
        self.seconds = self._seconds_before + time.perf_counter() - self._start

    def _again(self):
        kept = [a for a in self.argv if _split(a)[0] in ("runs", "publish", "smoke")]
        start = "python" if self.world == 1 else f"torchrun --nproc_per_node {self.world}"
        return shlex.join([*start.split(), f"{self.script}.py", "--resume", *kept])

    def every(self, n):
        """Whether n more steps are done now (for previews): true on the main process only. n = 0: never."""
        return bool(n) and self.is_main and (self.step + 1) % n == 0

    def log(self, **values):
        """Remember scalars of this step. They are read every `log_every` steps; a NaN loss stops the run."""
        self._records.append((self.step + 1, {k: v.detach() if torch.is_tensor(v) else v for k, v in values.items()}))

    def _begin_log(self):
        """Open metrics.jsonl; on resume drop what was logged after the checkpoint."""
        if not self.is_main:
            return
        self._metrics = self.folder / "metrics.jsonl"
        lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line)
            except (ValueError, KeyError):
                pass                                   # the line that a crash cut off
        with atomic(self._metrics) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        if self._resumed is None:
            write_json(self.folder / "run.json", {"lesson": self.name, "script": self.script,
                                                  "argv": [a for a in self.argv if _split(a)[0] != "resume"],
                                                  "config": _plain(self.config), "code": code_hash(self.lesson)})

    def _flush(self, bar=None):
        """Append the mean of the scalars since the last time to metrics.jsonl."""
        rows, self._records = self._read_records(), []
        if not rows or not self.is_main:
            return
        columns = {}
        for _, values in rows:
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        mean = {name: sum(column) / len(column) for name, column in columns.items()}
        seconds = time.perf_counter() - self._start
        record = {"step": rows[-1][0], **mean, "seconds": round(self._seconds_before + seconds, 2)}
        with open(self._metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        if bar is not None and "loss" in mean:
            bar.set_postfix_str(f"loss {mean['loss']:.4f}", refresh=False)

    def _read_records(self):
        """The remembered scalars as numbers; stops at a NaN."""
        rows = [(step, {k: float(v) for k, v in values.items()}) for step, values in self._records]
        for step, values in rows:
            for name, value in values.items():
                if not math.isfinite(value):
                    raise UserError(f"{name} is {value} at step {step}: stopped; {self._kept()}. "
                                    "Try a smaller lr or precision=fp32")
        return rows

    def _kept(self):
        last = next((p for p in ("last.pt", "previous.pt") if (self.folder / p).exists()), None)
        return f"the last good checkpoint is {self.folder / last}" if last else "no checkpoint was saved yet"

    @contextmanager
    def _progress(self, total):
        from tqdm import tqdm

        with tqdm(total=total, initial=self.step, disable=not self.is_main, mininterval=1.0, unit="step",
                  file=sys.stdout, ascii=True, ncols=90) as bar:
            yield bar

    @contextmanager
    def _signals(self):
        """Ctrl-C and SIGTERM ask the loop to save and stop after the step; a second Ctrl-C ends it at once."""
        self._stop = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number, frame):
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            if self.is_main:                           # not print: the signal may have come inside one
                os.write(2, b"\nstopping after this step; once more to stop at once without saving\n")

        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stop_wanted(self, log_every):
        if self.world == 1:
            return self._stop
        if self.step % log_every:                      # all processes must stop after the same step
            return False
        flag = torch.tensor(int(self._stop), device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag)

    # ------------------------------------------------------------------ checkpoints
    def save(self):
        """Write last.pt whole, keeping the one before as previous.pt. Weights that are not finite are not saved."""
        self._records = self._read_records()           # those of an unfinished line of metrics.jsonl are saved too
        states = {name: _bare(item).state_dict() for name, item in self._tracked.items()}
        bad = [name for name, item in self._tracked.items() if isinstance(item, torch.nn.Module)
               and not all(bool(v.isfinite().all()) for v in item.state_dict().values() if v.is_floating_point())]
        if bad:
            raise UserError(f"the weights of {bad[0]} are not finite after step {self.step}: stopped; {self._kept()}. "
                            "Try a smaller lr or precision=fp32")
        random = [torch.get_rng_state()]
        cuda = [torch.cuda.get_rng_state()] if self.device.type == "cuda" else []
        if self.world > 1:
            from accelerate.utils import gather_object

            random, cuda = gather_object(random), gather_object(cuda)
        if self.is_main:
            scaler = self.accelerator.scaler
            content = io.BytesIO()                     # serialised in memory: a full disk is then a plain OSError
            torch.save({"format": FORMAT, "lesson": self.name, "config": json.dumps(_plain(self.config)),
                        "step": self.step, "seconds": self._seconds_before + time.perf_counter() - self._start,
                        "states": states, "scaler": scaler.state_dict() if scaler else {}, "records": self._records,
                        "random": random, "random_cuda": cuda}, content)
            last = self.folder / "last.pt"
            with atomic(last) as temporary:
                temporary.write_bytes(content.getvalue())
                if last.exists():
                    os.replace(last, self.folder / "previous.pt")
        self.accelerator.wait_for_everyone()

    def _resume(self):
        """Find the newest unfinished run and read its checkpoint. Returns its arguments followed by the new ones."""
        runs = self._runs()
        folders = [p for p in numbered(runs) if any((p / f).exists() for f in ("last.pt", "previous.pt"))]
        unfinished = [p for p in folders if not (p / "weights.safetensors").exists()]
        if not unfinished:
            raise UserError(f"nothing to resume in {runs}: " + ("its runs are finished; " if folders else "")
                            + "start a new one without --resume")
        self.folder = unfinished[-1]
        if int(os.environ.get("RANK", 0)) == 0:
            self._hold()
            for leftover in self.folder.glob(".last.*.pt"):                # of a crash while saving
                leftover.unlink()
        for name in ("last.pt", "previous.pt"):
            if (self.folder / name).exists():
                try:
                    self._resumed = read_checkpoint(self.folder / name, self.name)
                    break
                except UserError as error:
                    print(f"{error}", file=sys.stderr)
        if self._resumed is None:
            raise UserError(f"no usable checkpoint in {self.folder}: delete that folder to resume an older run, "
                            "or start a new one without --resume")
        try:
            before = json.loads((self.folder / "run.json").read_text())["argv"]
        except (OSError, ValueError, KeyError):
            before = []
        # An overlay named again would be laid over the values that followed it.
        laid = [_split(a) for a in before if _split(a)[0] in OVERLAYS]
        return ([a for a in before if _split(a)[0] not in ("runs", "publish")]
                + [a for a in self.argv if _split(a) not in laid])

    def _check_resumed(self):
        """A resumed run must have the values it was started with, or it would not be the same run."""
        old, new = json.loads(self._resumed["config"]), _plain(self.config)
        for section in new:
            if section in ("sample", "reproduce"):
                continue
            for key in sorted(set(old.get(section, {})) | set(new[section])):
                a, b = old.get(section, {}).get(key), new[section].get(key)
                if a != b and not (section == self.script and key in FREE):
                    raise UserError(f"cannot resume {self.folder.name}: it was started with {section}.{key}={a}, "
                                    f"now it is {b}; put that back or start a new run without --resume")

    # ------------------------------------------------------------------ the end
    def finish(self, ema, **networks):
        """Write weights.safetensors (of the EMA, fp16), loss.png and the run's numbers. Returns them.

        networks: sections of the configuration from which sample.py rebuilds the objects (unet=..., ddpm=...).
        """
        try:
            result = self._write_results(ema, networks) if self.is_main else None
        finally:
            self._release()
        self.close()
        return result

    def _write_results(self, ema, networks):
        """What `finish` leaves in the folder; the weights last, for they say that the run is finished."""
        records = [json.loads(line) for line in self._metrics.read_text().splitlines()]
        pictures = []
        if records and "loss" in records[0]:
            from .images import save_losses

            pictures = [save_losses(records, self.folder / "loss.png")]
        trained = self.step * self.settings.batch_size
        numbers = {
            "steps": self.step, "minutes": round(self.seconds / 60, 2),
            "images_per_second": round(trained / max(self.seconds, 1e-9)),
            "data_share": round(self._waited / max(time.perf_counter() - self._start, 1e-9), 5),
            "parameters": sum(p.numel() for p in ema.module.parameters()),
            "peak_memory_mb": round(peak_memory_mb(self.device)),
            "loss": records[-1].get("loss") if records else None,
        }
        self.record("train" if self.device.type == "cpu" else "train_gpu", **numbers)
        weights = self.folder / "weights.safetensors"
        save_weights(ema.module, weights, self.name, **{k: _plain(v) for k, v in networks.items()})
        if self.settings.publish:
            for path in [weights, *pictures]:
                self.publish(path)
        print(f"trained for {numbers['minutes']} minutes on {device_name(self.device)}: {weights}")
        return SimpleNamespace(folder=self.folder, weights=weights, records=records, **numbers)

    def close(self):
        """Let go of the folder and of the other processes."""
        self._release()
        if self.world > 1:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()

    def record(self, name, **numbers):
        """Write numbers with how they were made to the folder's results.json (and the published one)."""
        entry = {**numbers, "command": " ".join([f"python {self.script}.py", *(
            a for a in self.argv if _split(a)[0] not in ("publish", "runs"))]),
                 "seed": self.settings.seed, "device": device_name(self.device), "dtype": self.precision,
                 "torch": torch.__version__, "script": self.script, "code": self.code}
        for folder in [self.folder] + [self.lesson / "results"] * bool(self.settings.publish):
            path = folder / "results.json"
            results = json.loads(path.read_text()) if path.exists() else {}
            results[name] = entry
            write_json(path, results)
        return entry

    def output(self, save, content, name, **options):
        """Call `save(content, path, **options)` for the file `name` in this run's folder; says where, publishes."""
        if not self.is_main:
            return None
        path = save(content, self.folder / name, **options)
        print(f"wrote {_short(path)}")
        if self.settings.publish:
            self.publish(path)
        return path

    def publish(self, path, name=None):
        """Copy a file of this run to results/."""
        with atomic(self.lesson / "results" / (name or Path(path).name)) as temporary:
            temporary.write_bytes(Path(path).read_bytes())

    @property
    def published(self):
        """The published weights: the lesson's own, or another lesson's file that it names as `sample.published`."""
        named = getattr(getattr(self.config, "sample", None), "published", "")
        return (self.lesson / (named or "results/weights.safetensors")).resolve()

    def read(self, path):
        """A weights file of this lesson or of the one that it takes its published weights from."""
        return Weights(path, self.name, lesson_name(self.published.parent.parent))

    def weights(self):
        """The weights that this script should use; says which.

        config's `weights` if given, else this folder's newest trained ones, else the published ones.
        Also opens the folder that this run's pictures go to.
        """
        given = getattr(self.settings, "weights", "") or ""
        trained = [p / "weights.safetensors" for p in numbered(self._runs()) if (p / "weights.safetensors").exists()]
        published = self.published
        if given == "published" or not given and not trained and published.exists():
            path, what = published, "published weights"
        elif given:
            path, what = Path(given), "given weights"
        elif trained:
            path, what = trained[-1], f"weights of your training run {trained[-1].parent.name}"
        else:
            raise UserError(f"no weights in {self._runs()} and none published in {published.parent}: "
                            "run `python train.py` first")
        loaded = self.read(path)
        self.say(f"using the {what}: {_short(path)}")
        if path.parent.parent == self._runs():
            self.folder = path.parent
        else:
            self.open_folder("published" if path == published else "samples")
        return loaded


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and has saved."""


class Weights:
    """A weights file: `.config` holds the sections its objects were made from, `.load(net)` fills a network.

    lessons: names of the lessons that it may be of.
    """

    def __init__(self, path, *lessons):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"there is no weights file {path}")
        try:
            with safe_open(self.path, "pt") as file:
                meta = file.metadata() or {}
                self.state = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}): delete it and train again") from None
        if meta.get("lesson") not in lessons:
            raise UserError(f"{path} holds weights of {meta.get('lesson', 'something else')}, not of "
                            f"{' or '.join(dict.fromkeys(lessons))}: choose another file with weights=FILE")
        try:
            self.config = {name: Section(**values) for name, values in json.loads(meta["config"]).items()}
        except (KeyError, ValueError, TypeError, AttributeError):
            raise UserError(f"{path} does not say how its network is built: train again") from None

    def load(self, net):
        """Copy the weights into `net` (float32). Every parameter must be there with its shape."""
        try:
            net.load_state_dict({key: value.float() if value.is_floating_point() else value
                                 for key, value in self.state.items()})
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{self.path} does not fit this network ({reason}): train again") from None
        return net


def save_weights(net, path, lesson, **config):
    """Write a network's weights in fp16, with its lesson and the configuration to rebuild it from."""
    from safetensors.torch import save

    state = {key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
             for key, value in net.state_dict().items()}
    if bad := [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise UserError(f"the weights are not finite ({bad[0]}): not written. Try a smaller lr or precision=fp32")
    with atomic(path) as temporary:
        temporary.write_bytes(save(state, {"lesson": lesson, "config": json.dumps(config)}))


def read_checkpoint(path, lesson):
    """A checkpoint's content: tensors and plain values only, never code. UserError if it is damaged or foreign."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                         # whatever a damaged or malicious file provokes
        if isinstance(error, OSError) and disk_error(error):
            raise
        raise UserError(f"{_short(path)} is damaged or no checkpoint ({type(error).__name__})") from None
    needed = {"lesson", "config", "step", "seconds", "states", "scaler", "random", "random_cuda"}
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or needed - set(saved):
        raise UserError(f"{_short(path)} is not a checkpoint of this course")
    if saved["lesson"] != lesson:
        raise UserError(f"{_short(path)} belongs to {saved['lesson']}, not to {lesson}")
    return saved


def trained(train, folder, argv, lesson):
    """The result of `train(argv)` in `folder` (an arm of reproduce.py): reused if finished, resumed if cut off.

    Reused only if arguments, configuration and code are the same.
    """
    argv = [*argv, f"runs={folder}"]
    wanted = _plain(load(Path(lesson) / "config.yaml", "train", argv, torch.cuda.is_available(), quiet=True))
    runs = Path(folder) / ("smoke" if wanted["train"]["smoke"] else "")
    runs = [p for p in numbered(runs) if (p / "run.json").exists()]
    if runs:
        made = json.loads((runs[-1] / "run.json").read_text())
        same = made["code"] == code_hash(lesson) and all(
            made["config"].get(s) == v for s, v in wanted.items() if s not in ("sample", "reproduce"))
        if same and (runs[-1] / "weights.safetensors").exists():
            return runs[-1] / "weights.safetensors"
        if same and any((runs[-1] / name).exists() for name in ("last.pt", "previous.pt")):
            return train([*argv, "--resume"]).weights
    return train(argv).weights


def ramp(step, warmup, steps):
    """The learning rate's course as a factor: up from 0 in `warmup` steps, then down to 0 in a straight line."""
    return min((step + 1) / max(warmup, 1), 1.0) * (1 - step / steps)


def lesson_name(folder):
    """lesson_05 or lesson_05/sublesson_a: what checkpoints and weights say they belong to."""
    folder = Path(folder)
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("sublesson") else folder.name


def numbered(folder):
    """The folders in `folder` that are called by a number, in its order."""
    found = [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name))


def _split(argument):
    """("resume", "true") for --resume and resume=true: what an argument says."""
    key, equals, value = argument.lstrip("-").partition("=")
    return key, value if equals else "true"


def _bare(item):
    """A network without its distributed wrapper."""
    return item.module if isinstance(item, torch.nn.parallel.DistributedDataParallel) else item


def _plain(value):
    """Sections -> dicts, so that JSON can hold them."""
    return {k: _plain(v) for k, v in vars(value).items()} if isinstance(value, Section) else value


def _short(path):
    """A path as a reader would type it."""
    for base in (Path.cwd(), ROOT):
        if Path(path).resolve().is_relative_to(base):
            return str(Path(path).resolve().relative_to(base))
    return str(path)
