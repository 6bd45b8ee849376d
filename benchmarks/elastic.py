"""Saved on any topology, resumed on any other: the whole matrix, as real processes over gloo.

    python benchmarks/elastic.py [--json=benchmarks/results/elastic.json]

On each topology a tiny model trains half of the steps and is stopped; every topology then goes on
from each of these checkpoints. Compared with one process on one device without a break: graphs of
every step, training losses, global norm of the parameters; on the topology of the checkpoint, bit
for bit with itself without a break. float64: 40 steps, 1e-10. float32: 20 steps, losses to 1e-5.
"""

import argparse
import json
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

from tqdm import tqdm

from data_pipelines.json_text import json_text
from demetar.tools.local_job import LocalJob
from demetar.tools.resume_check import compare, configure_like, finish

REPOSITORY = pathlib.Path(__file__).parents[1]

# name -> processes, devices of each, mesh (data, fsdp, model)
TOPOLOGIES = {
    "1x1": (1, 1, (1, 1, 1)),
    "1x8": (1, 8, (2, 2, 2)),
    "2x2": (2, 2, (2, 1, 2)),
    "4x1": (4, 1, (1, 4, 1)),
}
MODEL = [
    "--config.model.width=16",
    "--config.model.num_heads=2",
    "--config.data.eval_batch_size=16",
]


def arguments_on(name: str) -> tuple[list[str], int]:
    """Arguments of `demetar.main` for a topology, and how many processes."""
    count, devices, mesh = TOPOLOGIES[name]
    sizes = zip(("data", "fsdp", "model"), mesh, strict=True)
    axes = [f"--config.mesh.{axis}={size}" for axis, size in sizes]
    return [*axes, f"--config.mesh.cpu_devices={devices}"], count


def run(workdir: pathlib.Path, name: str, dtype: str, stop_at: int) -> None:
    """Trains on a topology until `stop_at`, from wherever `workdir` is."""
    more, count = arguments_on(name)
    arguments = [f"--workdir={workdir}", f"--config={REPOSITORY}/configs/qm9.py:smoke", *MODEL]
    arguments += [f"--config.model.dtype={dtype}", f"--config.checkpoint.stop_at={stop_at}"]
    arguments += ["--config.log.graphs=True", "--config.train.num_steps=100", *more]
    finish(LocalJob(arguments, count, quiet=True))


def matrix(folder: pathlib.Path, dtype: str, steps: int) -> list[dict]:
    """A row for each pair of topologies."""
    rows, half = [], steps // 2
    progress = tqdm(total=2 * len(TOPOLOGIES) + len(TOPOLOGIES) ** 2, desc=dtype, unit="run")
    for name in TOPOLOGIES:
        run(folder / f"whole-{name}", name, dtype, steps)
        progress.update()
        run(folder / f"half-{name}", name, dtype, half)
        progress.update()
    configure_like(folder / "whole-1x1")
    for saved in TOPOLOGIES:
        for resumed in TOPOLOGIES:
            workdir = folder / f"{saved}-{resumed}"
            shutil.copytree(folder / f"half-{saved}", workdir)
            run(workdir, resumed, dtype, steps)
            progress.update()
            found = compare(folder / "whole-1x1", workdir, steps)
            row = {"dtype": dtype, "steps": steps, "saved_on": saved, "resumed_on": resumed}
            row |= {"same_graphs": found.same_graphs, "loss": found.loss, "norm": found.norm}
            good = found.is_good(same_topology=False)
            if saved == resumed:
                row["bit_for_bit"] = compare(folder / f"whole-{saved}", workdir, steps).same_state
                good = good and row["bit_for_bit"]
            rows.append(row | {"good": good})
            shutil.rmtree(workdir)
    progress.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    rows = []
    for dtype, steps in (("float64", 40), ("float32", 20)):
        # A process for each: precision is set once.
        command = [sys.executable, __file__, "--only", dtype, str(steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout)
    result = {
        "command": "python benchmarks/elastic.py",
        "machine": f"{platform.machine()}, CPU, gloo",
        "topologies": {
            k: dict(zip(("processes", "devices", "mesh"), v, strict=True))
            for k, v in TOPOLOGIES.items()
        },
        "rows": rows,
    }
    text = json_text(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    for row in rows:
        print(
            f"{row['dtype']}  {row['saved_on']} -> {row['resumed_on']}  same graphs "
            f"{row['same_graphs']}  loss {row['loss']:.1e}  norm {row['norm']:.1e}  "
            f"{'bit for bit ' if row.get('bit_for_bit') else ''}{'ok' if row['good'] else 'BAD'}"
        )
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        with tempfile.TemporaryDirectory() as temporary:
            found = matrix(pathlib.Path(temporary), sys.argv[2], int(sys.argv[3]))
        print(json_text(found))
        sys.exit(0)
    sys.exit(main())
