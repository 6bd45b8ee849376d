"""Peers in PyTorch: how each is built, and the same molecules for each.

SchNet and ViSNet are those of PyTorch Geometric, the equivariant transformer is that of the
package torchmd-net. EGNN is the architecture its authors published for QM9, written plainly
here and checked against numbers of their own code (`check_egnn`).

PyTorch Geometric searches neighbours with pyg-lib, which is not on PyPI. `neighbours` stands in
for it: the same pairs, found beforehand, so that the peer pays less for them than it would.
"""

import pathlib

import numpy as np
import torch
from torch import nn

from data_pipelines.edges import rows_of

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "egnn_qm9.npz"
CUTOFF = 5.0  # angstrom, of SchNet, ViSNet and the transformer


class EgnnLayer(nn.Module):
    """One round of messages; names of parameters as in the official code."""

    def __init__(self, width: int):
        super().__init__()
        self.edge_mlp = nn.Sequential(
            nn.Linear(2 * width + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.att_mlp = nn.Sequential(nn.Linear(width, 1), nn.Sigmoid())
        self.node_mlp = nn.Sequential(
            nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, h, square, row, col, edge_mask):
        message = self.edge_mlp(torch.cat([h[row], h[col], square], dim=1))
        message = message * self.att_mlp(message) * edge_mask
        summed = torch.zeros_like(h).index_add_(0, row, message)
        return h + self.node_mlp(torch.cat([h, summed], dim=1))


class Egnn(nn.Module):
    """EGNN for QM9: 15 features of each atom, complete graphs padded to the batch's largest."""

    def __init__(self, width: int = 128, num_layers: int = 7):
        super().__init__()
        self.embedding = nn.Linear(15, width)
        self.layers = nn.ModuleList(EgnnLayer(width) for _ in range(num_layers))
        self.node_dec = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.graph_dec = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features, position, node_mask, edge_mask, row, col):
        """`[B n, 15], [B n, 3], [B, n, 1], [B n n, 1]`, ends `[B n n]` -> `[B]`."""
        h = self.embedding(features)
        square = (position[row] - position[col]).square().sum(1, keepdim=True)
        for layer in self.layers:
            h = layer(h, square, row, col, edge_mask)
        h = self.node_dec(h).view(*node_mask.shape[:2], -1) * node_mask
        return self.graph_dec(h.sum(1))[:, 0]

    def load_official(self, golden) -> None:
        names = {f"gcl_{n}.": f"layers.{n}." for n in range(len(self.layers))}
        state = {}
        for key in golden.files:
            if key.startswith("param/"):
                name = key.removeprefix("param/")
                for theirs, ours in names.items():
                    name = name.replace(theirs, ours)
                state[name] = torch.from_numpy(golden[key])
        self.load_state_dict(state)


def egnn_arguments(atomic_number, position, node_mask, dtype=torch.float32):
    """Padded arrays `[B, n]`, `[B, n, 3]`, `[B, n]` -> what `Egnn` takes."""
    size, n = atomic_number.shape
    number = torch.from_numpy(np.asarray(atomic_number, np.int64))
    one_hot = (number[..., None] == torch.tensor([1, 6, 7, 8, 9])).to(dtype)
    scaled = number.to(dtype)[..., None] / 9
    powers = torch.stack([torch.ones_like(scaled), scaled, scaled**2], -1)
    features = (one_hot[..., None] * powers).reshape(size * n, 15)
    mask = torch.from_numpy(np.asarray(node_mask, bool))
    edge_mask = mask[:, :, None] & mask[:, None] & ~torch.eye(n, dtype=torch.bool)
    first = torch.arange(size)[:, None, None] * n
    row = (first + torch.arange(n)[:, None]).expand(size, n, n).reshape(-1)
    col = (first + torch.arange(n)).expand(size, n, n).reshape(-1)
    return (
        features,
        torch.from_numpy(np.asarray(position)).to(dtype).reshape(size * n, 3),
        mask[..., None].to(dtype),
        edge_mask.reshape(-1, 1).to(dtype),
        row,
        col,
    )


def check_egnn() -> float:
    """Largest relative difference to predictions of the official code; float64."""
    golden = np.load(GOLDEN)
    model = Egnn().double()
    model.load_official(golden)
    arguments = egnn_arguments(
        golden["atomic_number"], golden["position"], golden["node_mask"] > 0, torch.float64
    )
    with torch.no_grad():
        prediction = model(*arguments).numpy()
    return float(np.abs(prediction / golden["prediction"] - 1).max())


class Flat:
    """A batch as PyTorch Geometric has it: atoms of all molecules in one row."""

    def __init__(self, arrays, graphs):
        starts, ends = arrays.node_offset[graphs], arrays.node_offset[graphs + 1]
        atoms = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        self.number = torch.from_numpy(arrays.atomic_number[atoms].astype(np.int64))
        self.position = torch.from_numpy(arrays.position[atoms].astype(np.float32))
        self.batch = torch.from_numpy(np.repeat(np.arange(len(graphs)), ends - starts))
        first = np.concatenate([[0], np.cumsum(ends - starts)[:-1]])
        edges = rows_of(arrays.edges, graphs)
        shift = np.repeat(first, arrays.edges.counts[graphs])
        one, other = (edges[:, k].astype(np.int64) + shift for k in (0, 1))
        self.edges = torch.from_numpy(
            np.stack([np.concatenate([one, other]), np.concatenate([other, one])])
        )


class Peer:
    """A model of others with what it needs: `predict(batch)` of `assemble(arrays, graphs)`.

    Attributes:
      edges: what the data set must have found: `complete` or `cutoff`.
      learning_rate: as published.
    """

    edges = "cutoff"
    learning_rate = 5e-4
    model: nn.Module

    def assemble(self, arrays, graphs):
        return Flat(arrays, graphs)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


class EgnnPeer(Peer):
    """Satorras et al. 2021, 7 x 128."""

    edges, learning_rate = "complete", 1e-3

    def __init__(self, compiled: bool = False):
        self.model = Egnn()
        # Shapes differ from batch to batch: one program for all of them.
        self._forward = torch.compile(self.model, dynamic=True) if compiled else self.model

    def assemble(self, arrays, graphs):
        n = int(arrays.sizes.num_nodes[graphs].max())
        atom = arrays.node_offset[graphs][:, None] + np.arange(n)
        mask = np.arange(n) < arrays.sizes.num_nodes[graphs][:, None]
        atom = np.where(mask, atom, 0)
        number = np.where(mask, arrays.atomic_number[atom], 0)
        position = np.where(mask[..., None], arrays.position[atom], 0)
        return egnn_arguments(number, position.astype(np.float32), mask)

    def predict(self, batch):
        return self._forward(*batch)


class SchNetPeer(Peer):
    """Schütt et al. 2017, PyTorch Geometric: 6 x 128, 50 Gaussians."""

    def __init__(self):
        from torch_geometric.nn import SchNet

        self._edges = None
        self.model = SchNet(128, 128, 6, 50, CUTOFF, interaction_graph=self._graph, readout="mean")

    def _graph(self, position, batch):
        row, col = self._edges
        return self._edges, (position[row] - position[col]).norm(dim=-1)

    def predict(self, batch):
        self._edges = batch.edges
        return self.model(batch.number, batch.position, batch.batch)[:, 0]


class ViSNetPeer(Peer):
    """Wang et al. 2024, PyTorch Geometric: 6 x 128, 32 radial functions."""

    learning_rate = 1e-4

    def __init__(self):
        from torch_geometric.nn.models import ViSNet, visnet

        self._edges = None
        visnet.radius_graph = self._graph
        self.model = ViSNet(cutoff=CUTOFF)

    def _graph(self, position, **_):
        loops = torch.arange(len(position)).expand(2, -1)
        return torch.cat([self._edges, loops], dim=1)

    def predict(self, batch):
        self._edges = batch.edges
        return self.model(batch.number, batch.position, batch.batch)[0][:, 0]


class TransformerPeer(Peer):
    """Thölke & De Fabritiis 2022, torchmd-net: 8 x 256, the settings of its ET-QM9.yaml."""

    learning_rate = 4e-4

    def __init__(self):
        from torchmdnet.models.model import create_model

        self.model = create_model(
            {
                "model": "equivariant-transformer", "embedding_dimension": 256, "num_layers": 8,
                "num_rbf": 64, "rbf_type": "expnorm", "trainable_rbf": False,
                "activation": "silu", "attn_activation": "silu", "num_heads": 8,
                "distance_influence": "both", "neighbor_embedding": True, "cutoff_lower": 0.0,
                "cutoff_upper": CUTOFF, "max_z": 100, "max_num_neighbors": 32,
                "aggr": "add", "reduce_op": "add", "output_model": "Scalar",
                "prior_model": None, "derivative": False, "atom_filter": -1, "precision": 32,
            }
        )  # fmt: skip

    def predict(self, batch):
        return self.model(batch.number, batch.position, batch.batch)[0][:, 0]


class DimeNetPeer(Peer):
    """Gasteiger et al. 2020, PyTorch Geometric's DimeNet++ with its own defaults for QM9."""

    learning_rate = 1e-3

    def __init__(self):
        from torch_geometric.nn.models import DimeNetPlusPlus, dimenet

        self._edges = None
        dimenet.radius_graph = lambda *_, **__: self._edges
        self.model = DimeNetPlusPlus(
            hidden_channels=128, out_channels=1, num_blocks=4, int_emb_size=64,
            basis_emb_size=8, out_emb_channels=256, num_spherical=7, num_radial=6, cutoff=CUTOFF,
        )  # fmt: skip
        # Its triplets need torch_sparse: fails here, at once, where that is missing.
        dimenet.triplets(torch.tensor([[0, 1], [1, 0]]), 2)

    def predict(self, batch):
        self._edges = batch.edges
        return self.model(batch.number, batch.position, batch.batch)[:, 0]


PEERS = {
    "egnn-pytorch": EgnnPeer,
    "egnn-pytorch-compiled": lambda: EgnnPeer(compiled=True),
    "schnet-pyg": SchNetPeer,
    "et-torchmdnet": TransformerPeer,
    "visnet-pyg": ViSNetPeer,
    "dimenet++-pyg": DimeNetPeer,
}
