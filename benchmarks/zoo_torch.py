"""The torch side of zoo.py, a process of its own: reads jobs as lines of JSON, runs them when told to, answers with times.

It has its own interpreter, because mmx never shares one with torch, and its own threads, which are quiet while it waits.
"""

import contextlib
import json
import sys
import time

import numpy as np
import torch
import transformers

BASE = {"attention": "sdpa", "channels_last": False, "pure": False, "compile": False}
TRIED = (
    ("attention", "eager"),
    ("channels_last", True),
    ("pure", True),
    ("compile", True),
)  # one after the other, kept if faster


class Job:
    """A model in one setting, ready to be run."""

    def __init__(self, job: dict, setting: dict):
        self.train, self.output, self.setting = job["train"], job["output"], setting
        kind = torch.bfloat16 if job["dtype"] == "bfloat16" else torch.float32
        cls = getattr(transformers, job["class"])
        try:
            model = cls.from_pretrained(job["folder"], attn_implementation=setting["attention"], dtype=torch.float32)
        except ValueError:  # this class has eager attention only
            model = cls.from_pretrained(job["folder"], dtype=torch.float32)
        memory = torch.channels_last if setting["channels_last"] else torch.contiguous_format
        model = model.train(self.train).to(kind if setting["pure"] else torch.float32).to(memory_format=memory)
        self.inputs = {name: torch.from_numpy(array) for name, array in np.load(job["inputs"]).items()}
        for name, array in self.inputs.items():
            if name.startswith("bool_"):
                self.inputs[name] = array.bool()
            elif setting["pure"] and array.is_floating_point():
                self.inputs[name] = array.to(kind)
            if array.ndim == 4:
                self.inputs[name] = self.inputs[name].contiguous(memory_format=memory)
        self.inputs |= job["flags"]
        self.labels = {name: array for name, array in self.inputs.items() if name.endswith("_labels")}
        if self.train:
            self.optimizer = torch.optim.AdamW(model.parameters(), fused=True, **job["adamw"])
        self.model = torch.compile(model) if setting["compile"] else model
        self.cast = contextlib.nullcontext
        if kind == torch.bfloat16 and not setting["pure"]:
            self.cast = lambda: torch.autocast("cpu", kind)

    def run(self) -> torch.Tensor:
        # FLAVA overwrites its labels in place
        inputs = {**self.inputs, **{name: array.clone() for name, array in self.labels.items()}}
        if not self.train:
            with torch.inference_mode(), self.cast():
                return self.model(**inputs)[self.output]
        with self.cast():
            loss = self.model(**inputs)[self.output]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def timed(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self.run()
        return (time.perf_counter() - start) / count


def fastest(job: dict) -> tuple[Job, dict]:
    """The job in the fastest setting, found one choice after the other, and the seconds of each setting that was tried."""
    setting, seconds = {**BASE, **job["setting"]}, {}

    def measure(setting: dict) -> float:
        made = Job(job, setting)
        made.run(), made.run()
        return min(made.timed(1) for _ in range(3))

    if job["search"]:
        best = seconds[json.dumps(setting)] = measure(setting)
        for name, value in TRIED:
            if name in job["setting"] or (name == "pure" and job["dtype"] == "float32"):
                continue
            trial = {**setting, name: value}
            try:
                now = seconds[json.dumps(trial)] = measure(trial)
            except Exception as error:  # noqa: BLE001  # whatever a compiler says: this setting is none
                print(f"{trial}: {error}", file=sys.stderr)
                continue
            if now < best:
                setting, best = trial, now
    return Job(job, setting), seconds


def load(job: dict) -> float:
    """Seconds of `from_pretrained`, and, if wanted, until every number was read: it maps the file and reads none."""
    start = time.perf_counter()
    model = getattr(transformers, job["class"]).from_pretrained(job["folder"])
    if job["read"]:
        sum(float(p.detach().sum()) for p in model.parameters())
    return time.perf_counter() - start


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(int(sys.argv[1]))
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    job = None
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "prepare":
            job = None  # its memory first
            job, seconds = fastest(order)
            value = job.run().float().numpy()
            np.save(order["result"], value)
            job.run()
            answer = {"setting": job.setting, "seconds": seconds}
        elif order["do"] == "run":
            answer = job.timed(order["count"])
        elif order["do"] == "forget":
            job = answer = None
        elif order["do"] == "load":
            answer = load(order)
        else:
            answer = f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
