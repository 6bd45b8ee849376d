"""A model as a calculator of ASE: energies, forces, and all other targets.

    atoms.calc = demetar.ase.Calculator(demetar.load_model("mine"), energy="U0")
    atoms.get_potential_energy(), atoms.get_forces()     # eV, eV/angstrom
    atoms.calc.results["U0"]                             # the target in its own unit

Forces are the negative gradient of the predicted energy by the positions: exact for the model, and
worth what it knows of geometries beside minima: a model that was trained on relaxed molecules alone
has never seen a force. Bonds are found at the first call for an `Atoms` and then kept, so that
stretching one does not change its type. With edges by distance (`cutoff`) a pair that comes within
the cutoff makes the energy jump, unless the model itself fades out there.
"""

import dataclasses
import functools
import weakref
from typing import Any

import jax
import numpy as np
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes, all_properties

from data_pipelines import batching
from data_pipelines.errors import UserError, check_known
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.readers.ase_files import row_of_atoms
from data_pipelines.molecules.record import Molecule, Refusal
from data_pipelines.molecules.units import factor
from demetar.inference import graphs
from demetar.inference.model import Model, load_model
from demetar.models import predict


class Calculator(AseCalculator):
    """An ASE calculator that predicts with a model.

    `atoms.info` may say `charge`, `multiplicity` and `smiles`, which the bonds are then taken from.

    Args:
      model: of `demetar.load_model`, or what that takes.
      energy: the target that is the energy, in any unit of energy; "": there is none, so there are
        no forces either. Nothing is an energy of the system without being named here: a HOMO has a
        unit of energy too. A target whose name means something to ASE, such as `dipole`, is not in
        `results`.
    """

    def __init__(self, model: Model | str, energy: str = "", **kwargs):
        super().__init__(**kwargs)
        self.model = model if isinstance(model, Model) else load_model(model)
        self.energy = energy
        if energy:
            targets = {target.name: target for target in self.model.targets}
            check_known("energy= of the calculator:", energy, targets)
            if targets[energy].per_node:
                raise UserError(
                    f"Target {energy!r} is one of atoms: name a target of the molecule."
                )
            self._in_ev = factor(targets[energy].unit, "eV")
        self.implemented_properties = ["energy", "free_energy", "forces"] if energy else []
        # What ASE has a name for has its unit there, too: only the energy named above is converted.
        names = [target.name for target in self.model.targets]
        self._own = [name for name in names if name not in all_properties]
        self.implemented_properties += self._own
        # id of an Atoms -> it, numbers and info that the bonds are for, its molecule.
        self._frozen: dict[int, tuple[weakref.ref, tuple, Molecule]] = {}
        self._info: tuple | None = None
        self._gradients: dict[Any, Any] = {}

    def get_property(self, name, atoms=None, allow_calculation=True):
        """Of ASE; says what to do where there is no energy."""
        if name in ("energy", "free_energy", "forces") and not self.energy:
            names = ", ".join(target.name for target in self.model.targets)
            raise PropertyNotImplementedError(
                f"Which target is the energy of the system? Name it: Calculator(model, "
                f"energy=...). Targets of {self.model.name}: {names}."
            )
        return super().get_property(name, atoms, allow_calculation)

    def check_state(self, atoms, tol: float = 1e-15) -> list[str]:
        """What differs from the last call: ASE's list, and "info" for what `info` says."""
        changes = super().check_state(atoms, tol)
        return [*changes, "info"] if _said(atoms) != self._info else changes

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        """Fills `results`; a molecule that the model does not know is a `UserError`."""
        super().calculate(atoms, properties, system_changes)
        if self.atoms.pbc.any():
            raise UserError(
                f"pbc is {self.atoms.pbc.tolist()}, and {self.model.name} knows molecules without "
                "a periodic cell: set atoms.pbc = False."
            )
        self._info = _said(self.atoms)
        molecule = self._current(self.atoms if atoms is None else atoms)
        values = self.model.predict_molecules([molecule], batch_size=1)
        found = {
            target.name: values[target.name] if target.per_node else float(values[target.name][0])
            for target in self.model.targets
        }
        self.results |= {name: found[name] for name in self._own}
        if self.energy:
            total = found[self.energy] * self._in_ev
            self.results |= {"energy": total, "free_energy": total}
            if "forces" in properties:
                self.results["forces"] = self._forces(molecule)

    def _current(self, atoms) -> Molecule:
        """The molecule as it lies now, with the bonds of the first call."""
        now = (atoms.numbers.tolist(), _said(atoms))
        owner, frozen_for, molecule = self._frozen.get(id(atoms), (lambda: None, None, None))
        if owner() is not atoms or frozen_for != now:
            made = make_molecule(row_of_atoms(1, atoms), "file")
            refusal = made if isinstance(made, Refusal) else self.model.refusal(made)
            if refusal:
                raise UserError(f"{atoms.get_chemical_formula()}: {refusal.message}")
            forget = functools.partial(self._frozen.pop, id(atoms))  # a later Atoms may have its id
            self._frozen[id(atoms)] = weakref.ref(atoms, forget), now, made
            molecule = made
        return dataclasses.replace(molecule, positions=atoms.positions.copy())

    def _forces(self, molecule: Molecule) -> np.ndarray:
        """[N, 3] eV/angstrom."""
        programs, kind = self.model.programs, self.model.edges[0]
        arrays = self.model.arrays_of([molecule])
        bucket = graphs.bucket_of(arrays.sizes.num_nodes[0], arrays.sizes.num_edges[0], kind)
        with programs.precision():
            batch = jax.device_put(batching.gather(arrays, np.zeros(1, np.int64), bucket))
            params = programs.params(programs.mesh(1))
            if bucket not in self._gradients:
                self._gradients[bucket] = self._gradient.lower(params, batch).compile()
            slope_1xNx3 = np.asarray(self._gradients[bucket](params, batch), np.float64)
        scale = self.model.package.normalizations[self.energy].scale
        return -self._in_ev * scale * slope_1xNx3[0, : len(molecule.positions)]

    @functools.cached_property
    def _gradient(self):
        """jitted (params, batch) -> gradient of the standardised energies by positions."""
        network, name = self.model.network, self.energy

        def total(position, params, batch):
            return predict(network, params, batch.replace(position=position))[name].sum()

        def gradient(params, batch):
            return jax.grad(total)(batch.position, params, batch)

        return jax.jit(gradient)


def _said(atoms) -> tuple:
    """What `info` says of a molecule."""
    return tuple(atoms.info.get(name) for name in ("charge", "multiplicity", "smiles"))
