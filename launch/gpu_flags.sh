# Optional settings for NVIDIA GPUs; sourced by the other scripts where GPU_FLAGS=1 is set.
# Never measured by this project: they are what large JAX trainers use. Measure before you keep them.
# An unknown XLA flag ends the program with its name; delete it here then.
# shellcheck shell=sh

# Overlap collectives with computing; join small ones. All-reduces are joined by the program, in
# config.mesh.gradient_groups.
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
XLA_FLAGS="$XLA_FLAGS --xla_gpu_all_gather_combine_threshold_bytes=134217728"
XLA_FLAGS="$XLA_FLAGS --xla_gpu_reduce_scatter_combine_threshold_bytes=67108864"
export XLA_FLAGS

# Leave some memory for NCCL's own buffers.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"

# Say what is wrong, not what goes well. On several networks, name the right one: NCCL_SOCKET_IFNAME.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
