"""NMP: the authors' code, and PyTorch Geometric's example."""

import numpy as np

from demetar.models.nmp import Nmp
from golden_systems.common import TARGET, System, intermediate, molecules


def batch(golden, meta):
    return molecules(golden, node_feature=golden["node_feature"].astype(float))


def authors_model(golden, meta):
    options = meta["options"]
    return Nmp(
        targets=(TARGET,),
        form="authors",
        width=options["node_dim"],
        rounds=options["num_propagation_steps"],
        set_steps=options["set2set_comps"],
        edge_layers=options["edge_num_layers"],
        edge_width=options["edge_hidden_dim"],
        output_layers=options["num_output_hidden_layers"],
        output_width=options["hidden_dim"],
        dtype="float64",
    )


def pyg_model(golden, meta):
    options = meta["options"]
    return Nmp(
        targets=(TARGET,),
        form="pyg",
        width=options["width"],
        rounds=options["rounds"],
        set_steps=options["set_steps"],
        edge_layers=1,
        edge_width=options["edge_width"],
        output_layers=1,
        output_width=options["width"],
        dtype="float64",
    )


def authors_weights(params, golden, meta):
    options, found = meta["options"], {}
    for side in ("in", "out"):
        ours, theirs = params[f"edge_{side}"], f"EdgeNetwork/adj_{side}_edge_nn"
        for number in range(options["edge_num_layers"]):
            found[f"{theirs}/W{number}"] = ours[f"hidden_{number}"]["kernel"]
            found[f"{theirs}/b{number}"] = ours[f"hidden_{number}"]["bias"]
        # Theirs are matrices [out, in], ours [in, out].
        found[f"{theirs}/output_W"] = _flat(np.swapaxes(ours["kernel"], 1, 2))
        found[f"{theirs}/output_b"] = np.swapaxes(ours["bias"], 0, 1).reshape(-1)
    found["EdgeNetwork/message_bias"] = params["message"]["bias"]
    gru = params["update"]
    of_input = np.split(gru["input"]["kernel"], 3, axis=1)
    of_state = [*np.split(gru["gates"]["kernel"], 2, axis=1), gru["state"]["kernel"]]
    for suffix, w, u in zip(("_z", "_r", ""), of_input, of_state, strict=True):
        found |= {f"GRUUpdate/GRU_w{suffix}": w, f"GRUUpdate/GRU_u{suffix}": u}
    read, loop = params["set2set"], "Set2VecOutput/output_LSTMLoopAtt"
    found["Set2VecOutput/att_W_1"] = read["to_keys"]["kernel"][None, None]
    found[f"{loop}att_W_2"] = read["to_query"]["kernel"]
    found[f"{loop}att_V"] = read["to_logit"]["kernel"]
    kernels = np.split(read["gates"]["kernel"], 4, axis=1)
    biases = np.split(read["gates"]["bias"][None], 4, axis=1)
    for gate, kernel, bias in zip("ifoc", kernels, biases, strict=True):
        found |= {f"{loop}{gate}m": kernel, f"{loop}{gate}b": bias}
    for number in range(options["num_output_hidden_layers"]):
        found[f"Set2VecOutput/W{number}"] = params[f"output_{number}"]["kernel"]
        found[f"Set2VecOutput/b{number}"] = params[f"output_{number}"]["bias"]
    found["Set2VecOutput/output_W"] = params["output"]["kernel"]
    found["Set2VecOutput/output_b"] = params["output"]["bias"]
    return found


def pyg_weights(params, golden, meta):
    def dense(ours, theirs):
        return {f"{theirs}.weight": ours["kernel"].T, f"{theirs}.bias": ours["bias"]}

    def recurrent(ours, theirs):
        found = {}
        for path, suffix in (("input", "ih_l0"), ("state", "hh_l0")):
            found[f"{theirs}.weight_{suffix}"] = ours[path]["kernel"].T
            found[f"{theirs}.bias_{suffix}"] = ours[path]["bias"]
        return found

    edge, root = params["edge"], params["message"]["root"]
    return (
        dense(params["atom_embedding"], "lin0")
        | dense(edge["hidden_0"], "conv.nn.0")
        | {"conv.nn.2.weight": _flat(edge["kernel"]).T, "conv.nn.2.bias": edge["bias"].reshape(-1)}
        | {"conv.lin.weight": root["kernel"].T, "conv.bias": root["bias"]}
        | recurrent(params["update"], "gru")
        | recurrent(params["set2set"], "set2set.lstm")
        | dense(params["output_0"], "lin1")
        | dense(params["output"], "lin2")
    )


def _flat(kernel):
    return kernel.reshape(len(kernel), -1)


def layers_of(names, rounds):
    """What modules return in each round: `{name in the file: module}`."""

    def layers(captured, predictions, batch, golden, meta):
        found = {
            f"{name}_{number}": intermediate(captured, path, number)
            for name, path in names.items()
            for number in range(meta["options"][rounds])
        }
        if "set2set" in golden:
            found["set2set"] = intermediate(captured, "set2set")
        return found

    return layers


SYSTEMS = {
    "nmp_official": System(
        authors_model,
        authors_weights,
        batch=batch,
        layers=layers_of({"layer": "update"}, "num_propagation_steps"),
    ),
    "nmp": System(
        pyg_model,
        pyg_weights,
        batch=batch,
        layers=layers_of({"layer": "update", "message": "message"}, "rounds"),
    ),
}
