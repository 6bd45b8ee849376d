"""Our TFDS builder: QM9 as ArrayRecord, with typed bonds, unpadded, energies exact.

A module of its own, because it imports TFDS, which only a preparation needs.
"""

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.bonds import Agreement, find_bonds
from data_pipelines.qm9.properties import COLUMNS


class Qm9(tfds.core.GeneratorBasedBuilder):
    """QM9 from an iterable of `SourceMolecule`.

    Attributes:
      agreement: molecules per `Agreement` of SMILES and geometry, filled while building.
    """

    VERSION = tfds.core.Version("1.0.0")
    name = "demetar_qm9"

    def __init__(self, molecules, **kwargs):
        self._molecules = molecules
        self.agreement = [0] * len(Agreement)
        super().__init__(**kwargs)

    def _info(self):
        tensor = tfds.features.Tensor
        exact = tfds.features.Encoding.BYTES  # without it TFDS stores float64 as float32
        return tfds.core.DatasetInfo(
            builder=self,
            description="QM9 as published, without the 3,054 uncharacterized molecules.",
            homepage="https://doi.org/10.6084/m9.figshare.c.978904.v5",
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(
                {
                    "index": tensor(shape=(), dtype=np.int64),
                    "atomic_number": tensor(shape=(None,), dtype=np.uint8, encoding=exact),
                    "position": tensor(shape=(None, 3), dtype=np.float32, encoding=exact),
                    "bonds": tensor(shape=(None, 3), dtype=np.uint16, encoding=exact),
                    "properties": tensor(shape=(len(COLUMNS),), dtype=np.float64, encoding=exact),
                    "smiles": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"molecules": self._generate_examples()}

    def _generate_examples(self):
        for molecule in self._molecules:
            bonds, agreement = find_bonds(
                molecule.smiles, molecule.atomic_numbers, molecule.positions
            )
            self.agreement[agreement] += 1
            yield (
                molecule.index,
                {
                    "index": molecule.index,
                    "atomic_number": molecule.atomic_numbers,
                    "position": molecule.positions.astype(np.float32),
                    "bonds": bonds,
                    "properties": molecule.properties,
                    "smiles": molecule.smiles,
                },
            )
