"""Loads of an 8B-shaped checkpoint, a process a way, one after the other; JSON lines."""

import json
import os
import select
import shutil
import subprocess
import sys
import time

T0 = time.time()
BUDGET = float(os.environ.get("BUDGET", 155))
FOLDER = sys.argv[1]
RESULTS = os.environ.get("RESULTS", ".")
TINY = bool(os.environ.get("TINY"))
HERE = os.path.dirname(os.path.abspath(__file__))
OUT = open(os.path.join(RESULTS, "tables1.jsonl"), "a")
LAYERS = 3 if TINY else 32


def write(**row):
    row["at"] = round(time.time() - T0, 1)
    line = json.dumps(row)
    print(line[:330], flush=True)
    OUT.write(line + "\n")
    OUT.flush()


def left():
    return BUDGET - (time.time() - T0)


class Worker:
    alive = []

    def __init__(self, way, folder=None, layers=LAYERS):
        self.way, self.buffer, self.sent = way, b"", 0
        self.log = open(os.path.join(RESULTS, f"worker_{way.replace(':', '_')}_{len(Worker.alive)}.log"), "w")
        command = [sys.executable, "-W", "ignore", f"{HERE}/worker.py", way, folder or FOLDER, str(layers)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        Worker.alive.append(self)

    def send(self, **command):
        self.sent += 1
        self.process.stdin.write((json.dumps({"id": self.sent, **command}) + "\n").encode())
        self.process.stdin.flush()

    def receive(self, seconds):
        end = time.time() + seconds
        while True:
            answer = self.next_answer(end)
            if answer is None or answer.pop("id", self.sent) == self.sent:
                return answer

    def next_answer(self, end):
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, end - time.time()))
            if not ready:
                return None
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                return {"error": f"process ended: {self.process.poll()}"}
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def ask(self, seconds, **command):
        try:
            self.send(**command)
            return self.receive(min(seconds, max(1, left()))) or {"error": "timeout"}
        except OSError as error:
            return {"error": repr(error)}

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def load(worker, times, note="", seconds=45):
    write(row="load", way=worker.way, note=note, **worker.ask(seconds, do="load", times=times))
    worker.end()


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    os.makedirs(FOLDER)
    try:
        work()
    finally:
        for w in Worker.alive:
            w.end()
        shutil.rmtree(FOLDER, ignore_errors=True)


def work():
    ways = ["bare:nf4", "bare:nf4", "tf:nf4", "bare:int8", "bare:int8", "tf:int8", "transformers_bnb:nf4", "bare:nf4_dq", "bare:nf4_dq",
            "fp:nf4", "fp:int8", "accelerate_bnb:nf4", "transformers_bnb:int8", "accelerate_bnb:int8", "bare:nf4"]
    workers = [Worker(way) for way in ways]
    few = f"{FOLDER}_few"
    shutil.rmtree(few, ignore_errors=True)
    kinds = ("float32", "float16", "bin", "bfloat16")
    others = [(k, way, Worker(way, f"{few}/{k}", 3 if TINY else 4)) for k in kinds for way in ("tf:nf4", "transformers_bnb:nf4")]
    makers = {"made": ([sys.executable, f"{HERE}/checkpoint.py", FOLDER], {}),
              "few": ([sys.executable, f"{HERE}/few.py", few], {"LAYERS": "3" if TINY else "4"})}
    makers = {name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
              for name, (command, env) in makers.items()}
    try:
        for name, maker in makers.items():
            out, error = maker.communicate(timeout=200 if TINY else 60)
            write(row=name, out=out[-300:], error=error[-300:] if maker.returncode else "")
        measure(workers, others, kinds, few)
    finally:
        for maker in makers.values():
            if maker.poll() is None:
                maker.kill()
        shutil.rmtree(few, ignore_errors=True)


def measure(workers, others, kinds, few):
    end = time.time() + (300 if TINY else 45)
    ready = []
    for w in [*workers, *(w for *_, w in others)]:
        reply = w.receive(max(0.1, end - time.time()))
        w.ready = bool(reply and "ready" in reply)
        ready.append(w.ready)
        if not w.ready:
            write(row="not ready", way=w.way, reply=reply)
    write(row="ready", n=sum(ready))
    limit = workers[-1]
    write(row="limit", **limit.ask(20, do="limit"))
    limit.end()
    by_way = {}
    for w in workers[:-1]:
        if w.ready:
            by_way.setdefault(w.way, []).append(w)
    for n in range(2):
        for way in ("bare:nf4", "bare:int8", "tf:nf4", "tf:int8", "bare:nf4_dq"):
            if len(by_way.get(way, [])) > n:
                load(by_way[way][n], 4 if n == 0 else 2, note="kernels may be compiled" if way.startswith("bare") and n == 0 else "")
    for way, times in (("transformers_bnb:nf4", 2), ("fp:nf4", 4), ("fp:int8", 4), ("accelerate_bnb:nf4", 1), ("transformers_bnb:int8", 1),
                       ("accelerate_bnb:int8", 1)):
        if way in by_way and left() > 10:
            load(by_way[way][0], times, seconds=min(40, left() - (35 if way == "accelerate_bnb:int8" else 8)))
    for k, way, w in others:
        if w.ready and os.path.exists(f"{few}/{k}/WRITTEN") and left() > 4:
            write(row="container", container=k, way=way, **w.ask(15, do="load", times=3 if way == "tf:nf4" else 1))
        w.end()
    if left() > 20:
        folders()
    write(row="end")


def folders():
    """Quantized folders: written by bigq, loaded by transformers and by bigq."""
    targets = {"bitsandbytes": f"{FOLDER}_bnb", "bigq": f"{FOLDER}_own"}
    try:
        saver = Worker("fp:nf4")
        ways = [("fp_ready", targets["bigq"]), ("fp_ready:as_bnb", targets["bitsandbytes"]), ("ready", targets["bitsandbytes"]),
                ("bnb_ready", targets["bitsandbytes"])]
        ways = [(way, folder, Worker(way, folder)) for way, folder in ways]
        if saver.receive(30 if not TINY else 200) is None:
            return
        write(row="save", **saver.ask(45 if not TINY else 200, do="save", folders=targets))
        saver.end()
        for way, folder, w in ways:
            if w.receive(20 if not TINY else 200) and left() > 4:
                write(row="folder", way=way, folder=folder.rsplit("_", 1)[1], **w.ask(20, do="load", times=2 if "bnb_ready" == way else 4))
            w.end()
    finally:
        for folder in targets.values():
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
