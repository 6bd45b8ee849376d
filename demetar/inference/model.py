"""A trained model in Python: molecules in, numbers in the units of the targets out.

    model = demetar.load_model("qm9-homo")     # a name that ships, a run folder, a folder or zip
    table = model.predict(["CCO", atoms, mol])

A molecule's numbers do not depend on its neighbours: a batch is padded to one of few shapes, each
of which is compiled once.
"""

import collections
import functools
import pathlib
import warnings
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from data_pipelines import batching
from data_pipelines.batch_plan import FILL
from data_pipelines.batching import GraphArrays
from data_pipelines.elements import symbols
from data_pipelines.errors import UserError
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.record import Molecule, Refusal, Row
from data_pipelines.targets import Target
from demetar.config.stored import real_dtype
from demetar.inference import graphs, inputs
from demetar.inference.card import CARD
from demetar.inference.domain import MOST_MOLECULES, Domain
from demetar.inference.package import Package, read
from demetar.inference.programs import Programs

# A molecule of more than this times as many atoms as the largest that was trained on is refused:
# nothing that was learned says anything about it, and attention over all pairs may fill the memory.
TIMES_LARGEST = 4


def load_model(where: str | pathlib.Path) -> "Model":
    """A model to predict with.

    Args:
      where: the name of one that ships, the folder or the zip of one, or the folder of a run, which
        may be under way: its best weights are taken, and its data are opened, not changed.

    Raises:
      UserError: there is none, it is damaged, or it predicts something else than of molecules.
    """
    folder = pathlib.Path(where)
    if (folder / "config.json").is_file() and not (folder / CARD).exists():
        from demetar.inference import runs  # needs Orbax, and the data

        return runs.model_of_run(folder)
    return Model(read(where))


class Model:
    """A trained network with its units.

    Args:
      package: weights and card.
      experiment: it was trained in, where that is known; else None.
    """

    def __init__(self, package: Package, experiment=None):
        card = package.card
        if card["items"] != "molecules" or set(card["inputs"]) - {"charge"}:
            needs = ", ".join(card["inputs"]) or "nothing beside positions"
            raise UserError(
                f"Model {package.name!r} is of {card['items']} and needs {needs}: it cannot "
                "predict of molecules. For particles use demetar.load_pretrained."
            )
        self.package, self._experiment = package, experiment
        self.network = package.network()
        self._elements = frozenset(package.elements)
        self._normalizations, self._references = package.normalizations, package.references
        self.edges = (card["edges"]["kind"], card["edges"]["cutoff"])
        self.programs = Programs(self.network, package.params, real_dtype(package.config))

    # --- what it is ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.package.name

    @property
    def targets(self) -> tuple[Target, ...]:
        """What it predicts, with units."""
        return self.package.targets

    @property
    def geometry(self) -> str:
        """How the positions were made that it was trained on: of `geometry.GEOMETRIES`."""
        return self.package.card["geometry"]

    @property
    def max_nodes(self) -> int:
        """The most atoms that a molecule may have."""
        return TIMES_LARGEST * self.package.card["largest"]["nodes"]

    def __repr__(self) -> str:
        targets = ", ".join(f"{t.name} ({t.unit})" for t in self.targets)
        return f"<demetar model {self.name!r}: {targets}>"

    def refusal(self, molecule: Molecule) -> Refusal | None:
        """Why this model says nothing about a molecule; None if it does."""
        name = lambda z: symbols()[z]
        known = self.package.elements
        if others := sorted(set(molecule.atomic_numbers.tolist()) - self._elements):
            return Refusal(
                "element",
                f"has {', '.join(map(name, others))}, and {self.name} has learned only "
                f"{', '.join(map(name, known))}: use a model of these elements.",
            )
        charges = self.package.card["charges"]
        if molecule.charge not in charges:
            return Refusal(
                "charge",
                f"has charge {molecule.charge}, and {self.name} has learned only "
                f"{', '.join(map(str, charges))}: use a model of this charge.",
            )
        size = len(molecule.atomic_numbers)
        if size > self.max_nodes:
            return Refusal(
                "too_large",
                f"has {size} atoms; {self.name} was trained on at most "
                f"{self.package.card['largest']}, and predicts for at most {self.max_nodes}.",
            )
        if not np.isfinite(molecule.positions).all():
            return Refusal("nonfinite", "has a coordinate that is no finite number.")
        return None

    # --- molecules -------------------------------------------------------------------------------

    def predict_molecules(
        self, molecules: Sequence[Molecule], batch_size: int | None = None
    ) -> dict[str, np.ndarray]:
        """Predictions of molecules that `refusal` lets pass.

        Args:
          molecules: any number, in any order.
          batch_size: graphs of a compiled program; None: `batch_size_for` their number. It changes
            no number by more than rounding.

        Returns:
          Name of a target -> float64 in its unit, as the data's source has it (atom references are
          added): [G]; or of each atom, [atoms] or [atoms, 3], molecule after molecule.
        """
        return self.predict_and_embed(molecules, batch_size)[0]

    def embed_molecules(
        self, molecules: Sequence[Molecule], batch_size: int | None = None
    ) -> np.ndarray:
        """[G, D] float32: what the network knows of each molecule before its read-out."""
        if not molecules:
            raise UserError("There are no molecules to embed: give at least one.")
        embedding = self.predict_and_embed(molecules, batch_size)[1]
        if embedding is None:
            raise UserError(
                f"Model {self.name!r} keeps no embedding: its class "
                f"{type(self.network).__name__} does not call `keep_embedding`."
            )
        return embedding

    def predict_and_embed(
        self, molecules: Sequence[Molecule], batch_size: int | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Both of the above in one pass; None in the place of an embedding that is not kept."""
        if not molecules:
            return self._empty(), None
        arrays = self.arrays_of(molecules)
        everything = np.arange(len(molecules))
        size = batch_size or batch_size_for(len(molecules))
        standardized, embedding = self._forward(arrays, everything, size)
        return self._restored(standardized, arrays), embedding

    def arrays_of(self, molecules: Sequence[Molecule]) -> GraphArrays:
        """Their graphs, by the rules of the model's training."""
        with_charge = "charge" in self.package.card["inputs"]
        return graphs.arrays_of(molecules, *self.edges, self.programs.dtype, with_charge)

    def ood(self, embedding_GxD: np.ndarray | None, number: int) -> np.ndarray:
        """[G] percentile of the distance to training, see `Domain`; NaN where it is not known."""
        if embedding_GxD is None or self.domain is None:
            return np.full(number, np.nan)
        return self.domain.percentile(embedding_GxD)

    @functools.cached_property
    def domain(self) -> Domain | None:
        """What training looked like to the network; of a run it is computed here, once."""
        if self.package.domain or self._experiment is None:
            return Domain.of_arrays(self.package.domain)
        parts = []
        for part in ("train", "validation"):
            members = self._experiment.dataset.split[part]
            among = np.sort(np.random.RandomState(0).permutation(members)[:MOST_MOLECULES])
            parts.append(self._forward(self._experiment.arrays, among, 32, one_shape=True)[1])
        return None if parts[0] is None else Domain.fit(*parts)

    def _forward(
        self, arrays: GraphArrays, graphs_g: np.ndarray, batch_size: int, one_shape: bool = False
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """What the network says of some graphs, in their order, standardised, float64.

        With `one_shape` all are padded as the largest of the data is: one program is compiled.
        """
        rows = self.programs.rows(batch_size)
        outputs, waiting = [], collections.deque()
        fetch = lambda: outputs.append(self._fetched(arrays, *waiting.popleft()))
        of_bucket = graphs.buckets_of(arrays, graphs_g, self.edges[0], one_shape)
        for bucket, members in of_bucket.items():
            for start in range(0, len(members), rows):
                at = members[start : start + rows]
                graphs_B = np.full(rows, FILL)
                graphs_B[: len(at)] = graphs_g[at]
                batch = batching.gather(arrays, graphs_B, bucket)
                batch = batch.replace(labels={}, label_mask={})
                waiting.append((at, graphs_g[at], self.programs(bucket, batch)))
                if len(waiting) > 2:  # computed by now: the host prepares while devices compute
                    fetch()
        while waiting:
            fetch()
        order = np.argsort(np.concatenate([at for at, *_ in outputs]), kind="stable")
        columns = {
            target.name: [row for _, rows, _ in outputs for row in rows[target.name]]
            for target in self.targets
        }
        joined = {
            target.name: _joined([columns[target.name][k] for k in order], target.per_node)
            for target in self.targets
        }
        if outputs[0][2] is None:
            return joined, None
        return joined, np.concatenate([embedding for *_, embedding in outputs])[order]

    def _fetched(self, arrays: GraphArrays, at, graphs_g, output):
        """One batch without its padding, on the host: (places, rows of each target, embedding)."""
        predictions, embedding = output
        found = {}
        for target in self.targets:
            values = np.asarray(predictions[target.name], np.float64)[: len(at)]
            if target.per_node:
                sizes = arrays.sizes.num_nodes[graphs_g]
                values = [v[:n] for v, n in zip(values, sizes, strict=True)]
            found[target.name] = values
        if embedding is not None:
            embedding = np.asarray(embedding, np.float32)[: len(at)]  # a slice by JAX is a program
        return at, found, embedding

    def _restored(
        self, standardized: dict[str, np.ndarray], arrays: GraphArrays
    ) -> dict[str, np.ndarray]:
        """In the units of the targets, with the references of the atoms."""
        num_nodes_G, found = arrays.sizes.num_nodes, {}
        for target in self.targets:
            normalization = self._normalizations[target.name]
            size = 0 if target.per_node else num_nodes_G
            values = normalization.restore(standardized[target.name], size)
            if references := self._references.get(target.name):
                of_element = np.zeros(max(references) + 1)
                of_element[list(references)] = list(references.values())
                of_atom = of_element[arrays.atomic_number]
                if not target.per_node:
                    of_atom = np.add.reduceat(of_atom, arrays.node_offset[:-1])
                values = values + of_atom
            found[target.name] = values
        return found

    def _empty(self) -> dict[str, np.ndarray]:
        shape = lambda t: (0, 3) if t.is_vector else 0
        return {target.name: np.zeros(shape(target)) for target in self.targets}

    # --- anything ---------------------------------------------------------------------------------

    def predict(self, molecules: Iterable, geometry: str = ""):
        """One row for each input, in their order; a bad one has a `status` and stops nothing.

        Args:
          molecules: SMILES, `ase.Atoms`, RDKit molecules, `Row`s or `Molecule`s, mixed; or one.
          geometry: how positions are made where a new one is to be made; "": as in training.

        Returns:
          A pandas `DataFrame` if pandas is installed, else a dict of arrays, with `<target>_pred`
          (NaN where there is none), `status`, `message`, `geometry` and `ood`, the percentile of
          the distance to training. Of targets of atoms each row has an array.
        """
        made = self._made(molecules, geometry)
        good = [k for k, item in enumerate(made) if isinstance(item, Molecule)]
        size = batch_size_for(len(made))
        values, embedding = self.predict_and_embed([made[k] for k in good], size)
        table = {}
        finite = np.ones(len(good), bool)
        for target in self.targets:
            rows = values[target.name]
            if target.per_node:
                ends = np.cumsum([len(made[k].atomic_numbers) for k in good])[:-1]
                rows = np.split(rows, ends) if good else []
            finite &= np.array([np.isfinite(row).all() for row in rows], bool)
            column = np.full(len(made), np.nan, object if target.per_node else np.float64)
            for k, row in zip(good, rows, strict=True):
                column[k] = row
            table[f"{target.name}_pred"] = column
        ood = np.full(len(made), np.nan)
        ood[good] = self.ood(embedding, len(good))
        said = [item if isinstance(item, Refusal) else Refusal("ok", "") for item in made]
        for k, is_finite in zip(good, finite, strict=True):
            if not is_finite:
                said[k] = Refusal("nonfinite", f"{self.name} gives a number that is not finite.")
        geometries = ["" if isinstance(m, Refusal) else m.geometry for m in made]
        return inputs.table(
            table
            | {
                "status": np.array([s.status for s in said], object),
                "message": np.array([s.message for s in said], object),
                "geometry": np.array(geometries, object),
                "ood": ood,
            },
            {f"{target.name}_pred": target.unit for target in self.targets},
        )

    def embed(self, molecules: Iterable, geometry: str = "") -> np.ndarray:
        """[G, D] float32 of any inputs, as `predict` takes them; NaN where one is refused."""
        made = self._made(molecules, geometry)
        good = [k for k, item in enumerate(made) if isinstance(item, Molecule)]
        if not good:
            raise UserError(f"No input has an embedding: the first says {made[0].message}")
        embedding = self.embed_molecules([made[k] for k in good], batch_size_for(len(made)))
        found = np.full((len(made), embedding.shape[1]), np.nan, np.float32)
        found[good] = embedding
        return found

    def _made(self, molecules: Iterable, geometry: str) -> list[Molecule | Refusal]:
        """Each input as a molecule that this model knows, or why not."""
        made = [self.make(item, geometry) for item in inputs.items_of(molecules)]
        self.warn_of_geometry({m.geometry for m in made if isinstance(m, Molecule)})
        return made

    def make(self, item: Row | Molecule, geometry: str = "") -> Molecule | Refusal:
        """The molecule of a row, by default with the geometry of training; or why there is none."""
        if isinstance(item, Row):
            item = make_molecule(item, geometry or inputs.geometry_for(item, self.geometry))
        return item if isinstance(item, Refusal) else self.refusal(item) or item

    def warn_of_geometry(self, geometries: set[str]) -> None:
        """Warns where positions were made in another way than those of training."""
        if others := sorted(geometries - set(self.geometry.split("+"))):
            warnings.warn(
                f"{self.name} was trained on the geometry {self.geometry!r}, and these molecules "
                f"have {', '.join(map(repr, others))}: its errors are larger than its card says.",
                UserWarning,
                stacklevel=4,
            )


def batch_size_for(number: int) -> int:
    """Graphs of a program where `number` inputs are at hand: few shapes, and few empty rows.

    On a CPU the activations of a small batch stay in the caches, but each batch costs the host
    time.
    """
    many = 128 if jax.local_devices()[0].platform == "cpu" else 256
    return 1 if number < 16 else 32 if number < 8 * many else many


def _joined(rows: list, per_node: bool) -> np.ndarray:
    return np.concatenate(rows) if per_node else np.array(rows)
