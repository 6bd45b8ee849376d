"""SchNet: the authors' first code, and PyTorch Geometric's (SchNetPack's gives the same)."""

import dataclasses

import numpy as np

from demetar.models.schnet import Schnet
from golden_systems.common import ELEMENTS, TARGET, System, intermediate, molecules

# Single-atom values that the first code adds to each atom's number. With us they belong to the
# data set, and no model has them: they travel with the molecules here, as numbers of the graph.
REFERENCES = "SchNet/atomref/embeddings/W"


def first_batch(golden, meta):
    references = golden[f"param/{REFERENCES}"].astype(float)[golden["atomic_number"]]
    mask = golden["node_mask"].astype(bool)[..., None]
    total = np.where(mask, references, 0).sum(axis=1)
    return molecules(
        golden, graph_feature=total / mask.sum(axis=1) if meta["options"]["intensive"] else total
    )


def first_output(predictions, batch):
    return predictions[TARGET.name][:, None] + batch.graph_feature


def first_model(golden, meta):
    options = meta["options"]
    readout = "mean" if options["intensive"] else "sum"
    return Schnet(
        targets=(dataclasses.replace(TARGET, readout=readout),),
        elements=ELEMENTS,
        generation="first",
        width=options["n_basis"],
        filter_width=options["n_filters"],
        num_layers=options["n_interactions"],
        cutoff=options["cutoff"],
        gap=options["gap"],
        dtype="float64",
    )


def second_model(golden, meta):
    options = meta["options"]
    return Schnet(
        targets=(TARGET,),
        elements=ELEMENTS,
        generation="schnetpack",
        width=options["hidden_channels"],
        filter_width=options["num_filters"],
        num_layers=options["num_interactions"],
        cutoff=options["cutoff"],
        num_radial=options["num_gaussians"],
        dtype="float64",
    )


# Ours -> theirs, in a layer and outside.
FIRST = {
    "filter_0": "SchNetFilter/Dense",
    "filter_1": "SchNetFilter/Dense_1",
    "sent": "CFConv/in2fac",
    "update_0": "CFConv/fac2out",
    "update_1": "Dense",
}
SECOND = {
    "filter_0": "mlp.0",
    "filter_1": "mlp.2",
    "sent": "conv.lin1",
    "update_0": "conv.lin2",
    "update_1": "lin",
}


def first_weights(params, golden, meta):
    def dense(ours, theirs):
        names = {"kernel": f"SchNet/{theirs}/W", "bias": f"SchNet/{theirs}/b"}
        return {names[kind]: value for kind, value in ours.items()}

    found = {"SchNet/atom_embedding/embeddings/W": params["atom_embedding"]["kernel"]}
    found |= dense(params["readout_0"], "Dense") | dense(params["readout_1"], "Dense_1")
    for number in range(meta["options"]["n_interactions"]):
        for ours, theirs in FIRST.items():
            found |= dense(params[f"layer_{number}"][ours], f"interaction_{number}/{theirs}")
    return found


def second_weights(params, golden, meta):
    def dense(ours, theirs):
        found = {f"{theirs}.weight": ours["kernel"].T}
        return found | ({f"{theirs}.bias": ours["bias"]} if "bias" in ours else {})

    found = {"embedding.weight": params["atom_embedding"]["kernel"]}
    found |= dense(params["readout_0"], "lin1") | dense(params["readout_1"], "lin2")
    for number in range(meta["options"]["num_interactions"]):
        for ours, theirs in SECOND.items():
            found |= dense(params[f"layer_{number}"][ours], f"interactions.{number}.{theirs}")
    return found


def first_layers(captured, predictions, batch, golden, meta):
    """Features after each block."""
    x, found = intermediate(captured, "atom_embedding"), {}
    for number in range(meta["options"]["n_interactions"]):
        x = x + intermediate(captured, f"layer_{number}")
        found[f"layer_{number}"] = x
    return found


def second_layers(captured, predictions, batch, golden, meta):
    """What each block adds, the numbers of atoms, and the basis of pairs with the first atom."""
    names = [f"layer_{number}" for number in range(meta["options"]["num_interactions"])]
    found = {name: intermediate(captured, name) for name in names}
    found["atom"] = intermediate(captured, "readout_1")
    position = golden["position"][0]
    distance = np.linalg.norm(position[batch.senders[0]] - position[batch.receivers[0]], axis=-1)
    inside = batch.edge_mask[0] & (distance < meta["options"]["cutoff"])
    rows = np.flatnonzero(inside & (batch.senders[0] == 0))
    basis = intermediate(captured, "basis")[0]
    found["rbf_of_first_atom"] = basis[np.concatenate([rows, rows])]  # from it, then to it
    return found


SYSTEMS = {
    "schnet_official": System(
        first_model,
        first_weights,
        batch=first_batch,
        output=first_output,
        layers=first_layers,
        weightless=(REFERENCES,),
    ),
    "schnet": System(second_model, second_weights, layers=second_layers),
}
