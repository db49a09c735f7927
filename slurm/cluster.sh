# shellcheck shell=bash disable=SC2034  # the scripts that source this use its variables
# What differs from cluster to cluster, in one place: how the program is started, and the network.
# Sourced by the sbatch scripts beside it.

# --- The program -------------------------------------------------------------------------------
# The environment that `make env` or `pip install '.[gpu]'` made; nodes must see it.
PYTHON=${PYTHON:-python}
PROGRAM=("$PYTHON" -m megatron_hybrid.cli)

# Options for every srun that starts the program. In a container, one of the two blocks:
#
# Pyxis and Enroot (the image of the Dockerfile, `enroot import docker://...`):
#   CONTAINER=(--container-image=/path/to/megatron-hybrid-gpu.sqsh
#              --container-mounts="$RUN_DIR,$CODE,/path/to/data" --no-container-mount-home)
#
# Apptainer (`apptainer build megatron-hybrid-gpu.sif docker-daemon://megatron-hybrid:gpu`):
#   PROGRAM=(apptainer exec --nv --bind "$RUN_DIR,$CODE,/path/to/data"
#            /path/to/megatron-hybrid-gpu.sif python -m megatron_hybrid.cli)
CONTAINER=()

# Where each node keeps its copy of the code: a local disk.
NODE_TMP=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}

# --- The network -------------------------------------------------------------------------------
# The interface of the addresses at which ranks first meet; on many clusters the first one is right.
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# H100 nodes with eight 400 Gb/s InfiniBand ports, one beside each GPU:
#   export NCCL_IB_HCA=mlx5         # the ports that carry data; the names are in `ibstat -l`
#   export NCCL_IB_QPS_PER_CONNECTION=2   # more queue pairs spread over more switch paths
#   export NCCL_IB_SL=0             # the service level that your fabric gives to training
# RoCE instead of InfiniBand:
#   export NCCL_IB_GID_INDEX=3 NCCL_IB_TC=106
# AWS EFA (with aws-ofi-nccl in the image):
#   export FI_PROVIDER=efa NCCL_NET_PLUGIN=ofi
# Within a node NVLink is found by itself; SHARP in NVLink switches (NVLS) is worth its memory on
# eight GPUs:
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-1}
# Tensor parallelism overlaps its communication only if kernels keep the order they were queued in.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# A collective that fails must end the process, not leave it waiting; its trace goes with it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
# NCCL_DEBUG=INFO says what was found and chosen, once, when something is slow or does not start.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
