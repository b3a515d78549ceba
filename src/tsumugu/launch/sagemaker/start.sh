#!/bin/bash
# The container's first process. It installs the wheels that lie beside it, without network, and becomes
# `python -m tsumugu.launch.sagemaker.container`, which thereby gets the signals that SageMaker sends to the container.
set -uo pipefail
code=$(cd "$(dirname "$0")" && pwd)
ml=${TSUMUGU_ML_ROOT:-/opt/ml}

# As the start script of AWS's images does: an older driver on the host needs CUDA's forward compatibility.
compat=$(readlink -f /usr/local/cuda/compat/libcuda.so.1 2>/dev/null || true)
driver=$(grep -m 1 NVRM /proc/driver/nvidia/version 2>/dev/null | grep -oE '[0-9]{3,}\.[0-9.]+' | head -n 1 || true)
if [ -f "$compat" ] && [ -n "$driver" ]; then
    made_for=${compat##*libcuda.so.}
    if [ "$driver" != "$made_for" ] && [ "$(printf '%s\n' "$driver" "$made_for" | sort -V | head -n 1)" = "$driver" ]; then
        export LD_LIBRARY_PATH=/usr/local/cuda/compat:${LD_LIBRARY_PATH:-}
    fi
fi

install() {
    local said
    if ! said=$(python -m pip install --no-index --no-cache-dir --disable-pip-version-check --root-user-action ignore \
        --quiet "$@" 2>&1); then
        echo "$said" >&2
        mkdir -p "$ml/output"
        echo "the image lacks what training needs: $(echo "$said" | grep -m 1 ERROR || echo "$said" | tail -n 1)" |
            cut -c 1-1000 | tee "$ml/output/failure" >"$ml/output/message"
        exit 2
    fi
}
install --no-deps --force-reinstall "$code"/wheels/tsumugu-*.whl
install --find-links "$code/wheels" --requirement "$code/requirements.txt"

exec python -m tsumugu.launch.sagemaker.container "$@"
