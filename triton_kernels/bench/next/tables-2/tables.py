"""Decode, offload and eager host times with the peers: a process a variant, of which one at a time works; JSON lines."""

import json
import os
import select
import subprocess
import sys
import time

T0 = time.time()
BUDGET = float(os.environ.get("BUDGET", 155))
FOLDER = sys.argv[1]
RESULTS = os.environ.get("RESULTS", ".")
TINY = bool(os.environ.get("TINY"))
OUT = open(os.path.join(RESULTS, "tables2.jsonl"), "a")
DECODE = ["bf16", "nf4", "nf4_fused", "nf4_dq", "bnb"]
if TINY:
    DECODE = ["bf16", "nf4", "nf4_fused", "bnb"]


def write(**row):
    row["at"] = round(time.time() - T0, 1)
    line = json.dumps(row)
    print(line[:300], flush=True)
    OUT.write(line + "\n")
    OUT.flush()


def left():
    return BUDGET - (time.time() - T0)


class Worker:
    def __init__(self, kind):
        self.kind, self.buffer, self.sent = kind, b"", 0
        self.log = open(os.path.join(RESULTS, f"worker_{kind}.log"), "w")
        env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "4"}
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py"), kind, FOLDER],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=env)

    def send(self, **command):
        self.sent += 1
        self.process.stdin.write((json.dumps({"id": self.sent, **command}) + "\n").encode())
        self.process.stdin.flush()

    def receive(self, seconds):
        """The answer to the last command; None if none has come in so many seconds."""
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

    def ask(self, seconds=40, **command):
        self.send(**command)
        return self.receive(min(seconds, max(1, left()))) or {"error": "timeout"}


def stats(values):
    values = sorted(values)
    return [round(values[0], 3), round(values[len(values) // 2], 3)]


def rounds(workers, commands, n):
    """Minimum and median by worker and command, by turns."""
    found, bad = {}, set()
    for _ in range(n):
        for w in workers:
            for name, command in commands.items():
                key = (w.kind, name)
                if key in bad or left() < 3:
                    continue
                reply = w.ask(**command)
                if "ms" not in reply:
                    write(row="failed", kind=w.kind, what=name, **reply)
                    bad.add(key)
                    continue
                found.setdefault(key, []).append(reply["ms"])
    for (kind, name), values in found.items():
        write(row="decode", kind=kind, what=name, ms=stats(values), n=len(values))


def main():
    import shutil
    shutil.rmtree(FOLDER, ignore_errors=True)
    os.makedirs(FOLDER)
    workers = {kind: Worker(kind) for kind in [*DECODE, "offload", "linear"]}
    try:
        work(workers)
    finally:
        for w in workers.values():
            w.process.kill()
        for w in workers.values():
            w.process.wait()
        shutil.rmtree(FOLDER, ignore_errors=True)


def work(workers):
    made = subprocess.run([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoint.py"), FOLDER],
                          capture_output=True, text=True, timeout=60)
    write(row="made", out=made.stdout[-200:], error=made.stderr[-300:] if made.returncode else "")
    alive = {}
    for kind, w in workers.items():
        reply = w.receive(max(1, 75 - (time.time() - T0)) if not TINY else 200) or {"error": "not ready"}
        write(row="worker", kind=kind, **reply)
        if "ready" in reply:
            alive[kind] = w
    decode = [alive[k] for k in DECODE if k in alive]
    for w in decode:
        write(row="check", kind=w.kind, **w.ask(do="check"))
    rounds(decode, {"graph 1": dict(do="graph", n=1), "graph 16": dict(do="graph", n=16)}, 5)
    rounds(decode, {"eager 1": dict(do="eager", n=1, calls=6), "eager 16": dict(do="eager", n=16, calls=6)}, 7)
    offload = alive.get("offload")

    def way(name, tokens, n, seconds=25):
        write(row="offload", way=name, **offload.ask(seconds, do="way", name=name, tokens=tokens, rounds=n))

    if offload:
        write(row="link", **offload.ask(do="measure_link"))
        way("half", [1, 16, 512], 8)
        way("nf4", [1, 16, 512, 2048, 4096], 6)
        way("resident", [1, 16, 512, 2048, 4096], 6)
        way("bf16", [1, 16, 512], 3)
        way("int8", [1, 16, 512], 5)
    linear = alive.get("linear")
    if linear:
        for m in (1, 4, 16, 256):
            write(row="linear", tokens=m, **linear.ask(do="batches", tokens=m, batches=2 if TINY else 40, calls=20 if TINY else 100))
    for kind in ("nf4", "nf4_fused"):
        if kind in alive and not TINY:
            write(row="kernels", kind=kind, **alive[kind].ask(do="kernels"))
    for w in decode:
        w.send(do="compile")
    if offload and left() > 45:
        offload.send(do="way", name="accelerate", tokens=[1], rounds=2)  # bound by pageable copies: the compilers may run beside it
    compiled = []
    for w in decode:
        reply = w.receive(max(1, left() - 12))
        write(row="compile", kind=w.kind, **(reply or {"error": "timeout"}))
        if reply and reply.get("works"):
            compiled.append(w)
    if offload:
        reply = offload.receive(max(0.1, min(20, left() - 8)))
        write(row="offload", way="accelerate", **(reply or {"error": "timeout"}))
    rounds(compiled, {"compiled 1": dict(do="run_compiled")}, 7)
    if offload and left() > 12:
        way("diffusers", [1, 512], 2, seconds=left() - 2)
    write(row="end")


if __name__ == "__main__":
    main()
