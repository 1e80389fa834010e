"""`Run`: what every script needs and no paper talks about.

Configuration, device, precision, seed, processes, the folder of a run, exact resume, what a run leaves. The training
loop itself stays in the lesson. Plain `python`, `torchrun` and `accelerate launch` all work. Three parts have rooms
of their own: checkpoint.py, log.py and weights.py.
"""

import json
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import torch

from . import checkpoint, files, launch
from .config import OVERLAYS, SCRIPTS, find, load, plain, read_bounds, split
from .data import load_images, shape_of, source_of, told
from .device import check_processes, device_name, home, move, peak_memory_mb, put, start, wait_for
from .errors import UserError, disk_error, mute
from .files import atomic, lesson_name, lock, numbered, read_json, short, update_json, write_json
from .images import PICTURES, check_finite
from .log import Log, progress
from .scores import check_number
from .seeds import generators
from .syntax import code_hash
from .weights import Weights, choose, save_weights


class Run:
    """One run of a lesson's script.

    file: the script's __file__; its folder is the lesson, its name the section of config.yaml.
    argv: key=value arguments (default: the command line).
    """

    def __init__(self, file, argv=None):
        self.lesson, self.script = Path(file).resolve().parent, Path(file).stem
        files.check_checkout(self.lesson)
        check_processes(os.environ)
        self.name = lesson_name(self.lesson)
        self.code = code_hash(self.lesson, self.script)             # now: the files may change while this runs
        self.argv = list(sys.argv[1:] if argv is None else argv)
        self.folder, self.step, self._lock = None, 0, None
        self.data = None                               # what this run, or the weights that it uses, learn from: a dict
        self._log, self._tracked, self._prepared = Log(), {}, False
        self._resumed, self._changed = None, {}        # the checkpoint that is gone on from, until that is done
        self._ends = []                                # the steps at which the loops of this run end
        self._start, self._seconds_before, self._waited = None, 0.0, 0.0
        config, cuda = self.lesson / "config.yaml", torch.cuda.is_available()
        self.config = load(config, self.script, self.argv, cuda)
        self.given = {(section, key): f"{typed}={text}"
                      for section, key, typed, text in find(plain(self.config), self.script, self.argv)}
        files.check_names(self.settings, self.lesson)
        if self.script == "train":
            self.check_given(vars(self.config).keys() - SCRIPTS)
        if getattr(self.settings, "metrics", False):
            check_number(self.settings.n)
        try:
            if self.script == "train" and getattr(self.settings, "resume", False):
                self.config = load(config, self.script, self._resume(), cuda, quiet=True)
                self._changed = checkpoint.check_same(self._resumed, self.config, self.script, self.folder)
            if self.settings.publish:                  # a damaged file is said before the work, not after it
                read_json(self.lesson / "results" / "results.json")
                files.sweep(self.lesson / "results")
            if self.script == "train":
                before = len(self._resumed["random"]) if self._resumed else None
                if (many := launch.number(file, self.settings, before)) > 1:
                    launch.start(many)
            self.accelerator, self.precision = start(self.settings.device, self.settings.precision)
        except BaseException:
            self._release()
            raise
        self.compute = self.accelerator.device         # of networks; all else is there, too, unless it is a Mac's GPU
        self.device = home(self.compute)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        torch.manual_seed(self.settings.seed)          # the same on every rank: the same first weights
        if self.device != self.compute:
            self.say("GPU of a Mac found: networks are computed there, in fp32; schedules, noise, solvers and exact "
                     "likelihoods on the CPU, in float64 (device=cpu turns it off)")

    @property
    def settings(self):
        """This script's own section of the configuration."""
        return self.config[self.script]

    @property
    def is_main(self):
        return self.rank == 0

    def check_given(self, sections=(), decided=None):
        """UserError if the reader gave a key of another section that this script's code does not read (`config.NAME`).

        sections: those that it hands on as they are. decided: the weights file that decides some others.
        """
        code = (self.lesson / f"{self.script}.py").read_text(encoding="utf-8")
        for (section, key), typed in self.given.items():
            if section in (self.script, *sections) or re.search(rf"config\.{section}(\.{key}\b|(?![.\w]))", code):
                continue
            there = decided.config.get(section, {}) if decided else {}
            if key in there.keys():
                raise UserError(f"{typed}: the weights decide that, and {short(decided.path)} has {section}.{key}="
                                f"{there[key]}; leave it out, or train with it: python train.py {typed}")
            raise UserError(f"{typed}: {self.script}.py does not read {section}.{key}; leave it out")

    def refuse(self, key, reason):
        """UserError if the reader gave this key of the script's own section: here it would have no effect."""
        if (self.script, key) in self.given:
            raise UserError(f"{self.given[self.script, key]}: {reason}; leave it out")

    def say(self, text):
        """Print once, however many processes there are."""
        if self.is_main:
            print(text, flush=True)

    # ------------------------------------------------------------------ device and processes
    def prepare(self, *objects):
        """Networks and optimizers for training on this device and these processes; other modules are moved.

        From the first call on every process draws its own noise.
        """
        warnings.filterwarnings("ignore", "Grad strides do not match")     # several processes; costs nothing here
        ready = []
        for item in objects:
            module = isinstance(item, torch.nn.Module)
            item = put(item, self.compute) if module else item
            learns = not module or any(p.requires_grad for p in item.parameters())
            ready.append(self.accelerator.prepare(item) if learns else item)
        if not self._prepared:
            torch.manual_seed(self.settings.seed + 1_000_003 * self.rank)
        self._prepared = True
        return ready[0] if len(ready) == 1 else tuple(ready)

    def place(self, *modules):
        """Modules for sampling: on the device, in evaluation mode, in this run's precision."""
        ready = tuple(put(m, self.compute).eval() for m in modules)
        ready = tuple(self.accelerator.prepare_model(m, evaluation_mode=True) if any(True for _ in m.parameters())
                      else m for m in ready)
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

    def generators(self, n):
        """One for each of n images to be drawn: image 3 of this seed is the same for any n, batch size and device."""
        return generators(self.settings.seed, n)

    # ------------------------------------------------------------------ images
    def images(self, net=None, split="train", limit=None):
        """The images that the key `data` names, as `utils.data.Images`, scaled to what a network's section says.

        Without a section, in sample.py: those that the weights learned from, in their shape.
        """
        if net is None:
            return load_images(source_of(self.data), self.data["shape"], split, 1, self.settings.seed, limit)
        named, batch_size = self.settings.data, self.settings.batch_size if split == "train" else 1
        try:
            found = load_images(named, shape_of(net), split, batch_size, self.settings.seed, limit)
            if split == "train":
                self._check_publish(found.name)
                if self._resumed:
                    checkpoint.check_data(self._resumed, found.about, self.folder.name)
        except UserError:
            self._release()
            raise
        if split == "train":
            self.data = found.about
            if found.is_own:
                self.data["source"] = str(Path(named).expanduser().resolve())
                self.say(f"{len(found)} images of {found.name} to learn from, every tenth is kept aside: "
                         f"{told(found.classes)}")
        return found

    def _check_publish(self, name):
        if self.settings.publish and (name == "fashion" or name.endswith("/")):
            raise UserError(f"publish=true is for what a lesson says of MNIST, and this is {name}: leave publish out; "
                            "all that a run makes stands in its folder")

    # ------------------------------------------------------------------ the run's folder
    def _runs(self):
        """The folder of this script's runs: `runs` in the lesson, or an absolute path; smoke and quick ones aside."""
        aside = "smoke" if self.settings.smoke else "quick" if getattr(self.settings, "quick", False) else ""
        return self.lesson / os.path.expanduser(self.settings.runs) / aside

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
            files.sweep(self.folder)
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
        """Name what a checkpoint holds (networks, optimizer, EMA). Loads it now if this run resumes one.

        Called again before a second loop, it adds what that loop trains, under names of their own.
        """
        objects = {name: item for name, item in objects.items() if item is not None}
        if again := set(objects) & set(self._tracked):
            raise ValueError(f"{min(again)} is tracked already: a later loop's objects need names of their own")
        self._tracked |= objects
        if (saved := self._resumed) is None:
            return
        try:
            if len(saved["random"]) != self.world:
                raise UserError(f"{self.folder} was trained by {len(saved['random'])} processes, not {self.world}: "
                                "start as many, or train anew without --resume")
            checkpoint.load_states(objects, saved, self.folder)
        except UserError:
            self._release()
            raise
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if not self.step:
            self.say(f"resumed {self.folder.name} after step {saved['step']}" + "".join(
                f", {key}={now} (before: {old})" for key, (old, now) in self._changed.items()))
        self.step, self._seconds_before = saved["step"], saved["seconds"]
        self._log.records = [tuple(record) for record in saved.get("records", [])]

    def steps(self, data, until=None):
        """Yield (step, (x0, labels)) up to config's `steps`, on this device; saves and stops between steps.

        Each process gets its own slice of every batch, so `batch_size` is that of the whole.
        until: this loop ends at that step, but the run does not; a later `run.steps(data)` goes on from there. A run
        that is resumed there passes through the first loop without a step, and again through all that stands between
        the two: what the second loop trains is made there and tracked, and noise is drawn from `run.generator()`.
        """
        if data.batch_size % self.world:
            raise UserError(f"batch_size={data.batch_size} must be a multiple of the {self.world} processes")
        total, log_every = self.settings.steps, getattr(self.settings, "log_every", 50)
        save_every, end = getattr(self.settings, "save_every", 0), total if until is None else min(until, total)
        self._ends.append(end)
        if self._resumed and self._ends != (before := self._resumed.get("ends", self._ends)[:len(self._ends)]) and (
                self._resumed["step"] > before[-1]):
            raise UserError(f"cannot resume {self.folder.name}: its loop up to step {before[-1]} is done and would now "
                            f"end at {end}; put steps={json.loads(self._resumed['config'])[self.script]['steps']} back")
        if self._start is None:
            self._begin(data, total)
        if self._resumed and self.step <= end:         # all is loaded; noise goes on from where it was
            checkpoint.set_random_states(self._resumed, self.compute, self.rank)
            self._resumed = None
        try:
            with self._signals(), progress(self.step, end, self.is_main and self.step < end) as bar:
                while self.step < end:
                    before = time.perf_counter()
                    batch = tuple(move(part, self.device) for part in data.batch(self.step, self.rank, self.world))
                    self._waited += time.perf_counter() - before
                    yield self.step, batch
                    self.step += 1
                    try:
                        bar.update()
                    except OSError:                    # nobody reads: behind `| head`, or the window is closed
                        mute()
                        self._stop = True
                    if self.step % log_every == 0 or self.step == end:
                        mean = self._log.flush(self._elapsed())
                        if "loss" in mean:
                            bar.set_postfix_str(f"loss {mean['loss']:.4f}", refresh=False)
                    stop = self._stop_wanted(log_every)
                    if stop or save_every and self.step % save_every == 0 and self.step < total:
                        self.save()
                    if stop:
                        raise Stopped(f"stopped and saved after step {self.step}; go on with: {self._again()}")
        except BaseException:                          # a notebook keeps the exception, and with it this object
            self._release()
            raise
        self.seconds = self._elapsed()

    def _begin(self, data, total):
        """Before the first step of this process: the folder, metrics.jsonl and run.json, the clock."""
        self.open_folder()
        self._log.open(self.folder, self.step, self.is_main)
        if self.is_main and self._resumed is None:
            write_json(self.folder / "run.json", {"lesson": self.name, "script": self.script,
                                                  "argv": [a for a in self.argv if split(a)[0] != "resume"],
                                                  "config": plain(self.config), "code": code_hash(self.lesson),
                                                  "data": self.data})
        elif self.is_main and self._changed:
            made = read_json(self.folder / "run.json")
            changes = {key: {"from": old, "to": now} for key, (old, now) in self._changed.items()}
            write_json(self.folder / "run.json", made | {
                "argv": self._argv, "config": plain(self.config),
                "changed": [*made.get("changed", []), {"step": self.step, **changes}]})
        self.say(f"training {self.name} on {device_name(self.compute, self.world)}, {self.precision}, {total} steps of "
                 f"{data.batch_size} -> {self.folder}")
        self._start = time.perf_counter()

    def _elapsed(self):
        """Seconds of training, those before an interruption included."""
        return self._seconds_before + self.clock() - self._start

    def clock(self):
        """Seconds since some moment, read when the device has done all it was given: a GPU works on after a call."""
        wait_for(self.compute)
        return time.perf_counter()

    def every(self, n):
        """Whether n more steps are done now (for previews): true on the main process only. n = 0: never."""
        return bool(n) and self.is_main and (self.step + 1) % n == 0

    def log(self, **values):
        """Remember scalars of this step. They are read every `log_every` steps; a NaN loss stops the run."""
        self._log.add(self.step + 1, values)

    # ------------------------------------------------------------------ stopping, saving, going on
    @contextmanager
    def _signals(self):
        """Ctrl-C, SIGTERM and the end of the terminal ask the loop to save and stop after the step.

        A second Ctrl-C ends it at once. What `nohup` started outlives its terminal.
        """
        self._stop = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        hangup = getattr(signal, "SIGHUP", None)       # Windows has none
        numbers = [signal.SIGINT, signal.SIGTERM]
        numbers += [hangup] * (hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN)

        def ask(number, frame):
            if number == hangup:                       # may come twice: from the shell and from the system
                mute(terminal=True)
            elif self._stop:
                raise KeyboardInterrupt
            self._stop = True
            if self.is_main:                           # not print: the signal may have come inside one
                with suppress(OSError):
                    os.write(2, b"\nstopping after this step; once more to stop at once without saving\n")

        old = {number: signal.signal(number, ask) for number in numbers}
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

    def _again(self):
        kept = [a for a in self.argv if split(a)[0] in ("runs", "publish", "smoke")]
        begin = "python" if self.world == 1 or launch.started() else f"torchrun --nproc_per_node {self.world}"
        return shlex.join([*begin.split(), f"{self.script}.py", "--resume", *kept])

    def save(self):
        """Write last.pt whole, keeping the one before as previous.pt. Weights that are not finite are not saved."""
        records = self._log.read()                     # those of an unfinished line of metrics.jsonl are saved too
        states = checkpoint.states(self._tracked, self.folder, self.step)
        random = checkpoint.random_states(self.compute, self.world)
        if self.is_main:
            scaler = self.accelerator.scaler
            checkpoint.write_checkpoint(
                self.folder, lesson=self.name, config=json.dumps(plain(self.config)), step=self.step, ends=self._ends,
                seconds=self._elapsed(), states=states, scaler=scaler.state_dict() if scaler else {}, records=records,
                data=self.data, **random)
        self.accelerator.wait_for_everyone()

    def _resume(self):
        """Find the run to go on with and read its checkpoint. Returns its arguments followed by the new ones."""
        self.folder = checkpoint.to_resume(self._runs())
        if int(os.environ.get("RANK", 0)) == 0:
            self._hold()
            files.sweep(self.folder)
        self._resumed = checkpoint.newest(self.folder, self.name)
        try:
            before = read_json(self.folder / "run.json").get("argv", [])
        except (OSError, UserError):
            before = []
        before = [a for a in before if isinstance(a, str)] if isinstance(before, list) else []
        # An overlay named again would be laid over the values that followed it. The GPU's is laid or not as it was,
        # whatever this machine has: it says how large the network is.
        laid = [split(a) for a in before if split(a)[0] in OVERLAYS]
        gpu = json.loads(self._resumed["config"])[self.script].get("gpu") is True
        first = [] if "gpu" in dict(laid) else [f"gpu={str(gpu).lower()}"]
        now = [a for a in self.argv if split(a) not in laid and split(a)[0].split(".")[-1] != "gpu"]
        before = [*first, *(a for a in before if split(a)[0] not in ("runs", "publish"))]
        self._argv = [*before, *(a for a in now if split(a)[0].split(".")[-1] not in ("resume", "runs", "publish"))]
        return before + now

    # ------------------------------------------------------------------ what a run leaves
    def finish(self, ema, **networks):
        """Write weights.safetensors (of the EMA, fp16), loss.png and the run's numbers. Returns them.

        networks: sections of the configuration from which sample.py rebuilds the objects (unet=..., ddpm=...).
        """
        try:
            result = self._write_results(ema, networks) if self.is_main else None
            self._save_end()
        finally:
            self._release()
        self.close()
        return result

    def _write_results(self, ema, networks):
        """What `finish` leaves in the folder: first the weights, which cost the most, then numbers, then pictures.

        What goes wrong after the weights costs only itself.
        """
        weights = self.folder / "weights.safetensors"
        data = self.data or {"name": getattr(self.settings, "data", "mnist")}              # points have no more to tell
        save_weights(ema.module, weights, self.name, data, **{k: plain(v) for k, v in networks.items()})
        records, pictures = self._log.lines(), []
        numbers = {
            "steps": self.step, "minutes": round(self.seconds / 60, 2),
            "images_per_second": round(self.step * self.settings.batch_size / max(self.seconds, 1e-9)),
            "data_share": round(self._waited / max(time.perf_counter() - self._start, 1e-9), 5),
            "parameters": sum(p.numel() for p in ema.module.parameters()),
            "peak_memory_mb": round(peak_memory_mb(self.compute)),
            "loss": records[-1].get("loss") if records else None,
        }
        try:
            failed = None
            self.record("train", **numbers)
            write_json(self.folder / "run.json", read_json(self.folder / "run.json") | {"finished": self.step})
        except (UserError, OSError) as error:
            failed = isinstance(error, OSError) and disk_error(error) or error
        if records and "loss" in records[0]:
            pictures = self._losses(records)
        if self.settings.publish:
            for path in [weights, *pictures]:
                self.publish(path)
        print(f"trained for {numbers['minutes']} minutes on {device_name(self.compute, self.world)}: {weights}")
        if failed:
            raise UserError(f"the weights are whole, the numbers of this run could not be kept: {failed}")
        return SimpleNamespace(folder=self.folder, weights=weights, records=records, **numbers)

    def _save_end(self):
        """A last checkpoint, from which a finished run may go on with more steps; a run without it is whole too."""
        try:
            if getattr(self.settings, "save_every", 0):
                self.save()
        except (OSError, UserError) as error:
            print(f"warning: no checkpoint of the end ({isinstance(error, OSError) and disk_error(error) or error}); "
                  "the weights and the numbers are whole", file=sys.stderr)

    def _losses(self, records):
        """[path of loss.png]; [] and a warning where it cannot be drawn."""
        try:
            from .images import save_losses

            return [save_losses(records, self.folder / "loss.png")]
        except Exception as error:                     # whatever a broken matplotlib or a full disk does
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: no loss.png ({reason}); the weights and the numbers are whole", file=sys.stderr)
            return []

    def close(self):
        """Let go of the folder and of the other processes."""
        self._release()
        if self.world > 1:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()

    def record(self, name, **numbers):
        """Write numbers with how they were made to the folder's results.json (and the published one).

        Those of a GPU go by a name of their own, NAME_gpu (of a Mac's, NAME_mps), beside the CPU's.
        """
        name += {"cpu": "", "cuda": "_gpu"}.get(self.compute.type, f"_{self.compute.type}")
        entry = {**numbers, "command": " ".join([f"python {self.script}.py", *(
            a for a in self.argv if split(a)[0] not in ("publish", "runs"))]),
                 "seed": self.settings.seed, "device": device_name(self.compute, self.world), "dtype": self.precision,
                 "torch": torch.__version__, "script": self.script, "code": self.code}
        for folder in [self.folder] + [self.lesson / "results"] * bool(self.settings.publish):
            with update_json(folder / "results.json") as results:
                results[name] = entry
        return entry

    def output(self, save, content, name, **options):
        """Call `save(content, path, **options)` for the file `name` in this run's folder; says where, publishes."""
        if not self.is_main:
            return None
        if self.script == "sample" and save in PICTURES:
            check_finite(content)
        path = save(content, self.folder / name, **options)
        print(f"wrote {short(path)}")
        if self.settings.publish:
            self.publish(path)
        return path

    def publish(self, path, name=None):
        """Copy a file of this run to results/: weights and pictures are those of a CPU, a GPU publishes numbers."""
        if self.compute.type != "cpu":
            print(f"not published: {Path(path).name}, for results/ holds what a CPU makes; of a GPU, numbers alone")
            return
        with atomic(self.lesson / "results" / (name or Path(path).name)) as temporary:
            temporary.write_bytes(Path(path).read_bytes())

    # ------------------------------------------------------------------ weights to sample with
    @property
    def published(self):
        """The published weights: the lesson's own, or another lesson's file that it names as `sample.published`."""
        named = getattr(getattr(self.config, "sample", None), "published", "")
        return (self.lesson / (named or "results/weights.safetensors")).resolve()

    def read(self, path):
        """A weights file of this lesson or of the one that it takes its published weights from."""
        return Weights(path, self.name, lesson_name(self.published.parent.parent),
                       bounds=read_bounds(self.lesson / "config.yaml"))

    def weights(self):
        """The weights that this script should use; says which.

        config's `weights` if given, else this folder's newest trained ones, else the published ones.
        Also opens the folder that this run's pictures go to.
        """
        path, what = choose(getattr(self.settings, "weights", ""), self._runs(), self.published)
        loaded = self.read(path)
        self.check_given(decided=loaded)
        self._use(loaded, what)
        if path.parent.parent == self._runs():
            self.folder = path.parent
            files.sweep(self.folder)
        else:
            self.open_folder("published" if path == self.published else "samples")
        return loaded

    def _use(self, weights, what):
        """Say which weights these are and what they learned from; refuse what only MNIST has."""
        data = weights.data
        classes = f": {told(data.classes)}" if data.classes and data.name != "mnist" else ""
        self.say(f"using the {what}: {short(weights.path)} (trained on {data.name}{classes})")
        if getattr(self.settings, "metrics", False) and data.shape and (data.name, *data.shape) != ("mnist", 1, 28, 28):
            raise UserError("metrics=true: the scores compare with MNIST's digits of 28 x 28 pixels, and these weights "
                            f"draw {data.name} of {data.shape[1]} x {data.shape[2]}: leave metrics out")
        self._check_publish(data.name)
        self.data = {**data, "run": weights.path.parent / "run.json"}      # which knows where a folder of images is


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and has saved."""


def trained(train, folder, argv, lesson):
    """The result of `train(argv)` in `folder` (an arm of reproduce.py): reused if finished, resumed if cut off.

    Reused only if arguments, configuration and code are the same.
    """
    argv = [*argv, f"runs={folder}"]
    wanted = plain(load(Path(lesson) / "config.yaml", "train", argv, torch.cuda.is_available(), quiet=True))
    runs = Path(folder) / ("smoke" if wanted["train"]["smoke"] else "")
    runs = [p for p in numbered(runs) if (p / "run.json").exists()]
    if runs:
        made = read_json(runs[-1] / "run.json")
        same = made.get("code") == code_hash(lesson) and all(
            made.get("config", {}).get(section, {}).get(key) == value for section, values in wanted.items()
            if section not in ("sample", "reproduce") for key, value in values.items() if key != "debug")
        if same and (runs[-1] / "weights.safetensors").exists():
            return runs[-1] / "weights.safetensors"
        if same and checkpoint.checkpoints(runs[-1]):
            argv = [*argv, "--resume"]
    weights = train(argv).weights
    for path in checkpoint.checkpoints(weights.parent):            # nobody goes on with an arm: its checkpoints only
        path.unlink()                                              # take room
    return weights


def ramp(step, warmup, steps):
    """The learning rate's course as a factor: up from 0 in `warmup` steps, then down to 0 in a straight line."""
    if warmup > steps:
        files.warn_once(f"warmup={warmup} is longer than the {steps} steps: the learning rate never comes to its value")
    return min((step + 1) / max(warmup, 1), 1.0) * (1 - step / steps)
