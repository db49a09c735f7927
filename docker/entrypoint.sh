#!/usr/bin/env bash
# What a container of the images runs:
#
#   docker run IMAGE pretrain tiny ...    a command of megatron-hybrid, here `pretrain`
#   docker run IMAGE --help               megatron-hybrid itself, with this option
#   docker run IMAGE bash                 anything else is run as it is
#
# Every way ends in `exec`, so that the signals of `docker stop` reach the program itself.
set -euo pipefail

case "${1-}" in
    "" | -* | compress | config | convert | counts | data | distill | doctor | evaluate | \
        generate | plan | preflight | pretrain | smoke-test | status | submit | track | upcycle | \
        verdict)
        set -- megatron-hybrid "$@"
        ;;
esac

# NVIDIA's images choose here the CUDA libraries that fit the host's driver, and say so.
base=${BASE_ENTRYPOINT:-/opt/nvidia/nvidia_entrypoint.sh}
if [ -x "$base" ]; then
    exec "$base" "$@"
fi
exec "$@"
