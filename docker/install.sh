#!/usr/bin/env bash
# Install this project's requirements beside the torch, Transformer Engine, flash-attn and apex of NVIDIA's PyTorch image,
# and fail when pip has exchanged one of them. Run it inside that image.
#
#   docker/install.sh          into the image itself (docker/Dockerfile does that)
#   docker/install.sh VENV     into a virtual environment that sees the image's packages, where nobody may build images
#
# WITHOUT="flash-attn apex" allows an image that lacks them. PYTHON chooses the interpreter (default python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python}
constraints=${PIP_CONSTRAINT:-}
if (($#)); then
    # --without-pip: the image lacks Debian's ensurepip, and the image's own pip is seen and installs into the environment.
    [[ -x $1/bin/python ]] || "$python" -m venv --system-site-packages --without-pip "$1"
    python=$1/bin/python
    constraints=$1/image-constraints.txt
fi
: "${constraints:?is not set: name a virtual environment, or the file in PIP_CONSTRAINT}"
read -ra without <<<"${WITHOUT:-}"

"$python" docker/check_image.py freeze "$constraints"
# requirements/constraints.txt is left out on purpose: it pins what was tested with PyPI's torch, and would exchange packages
# that the image's builds were tested with. base.txt pins what the code depends on; pip leaves the rest as the image has it.
# No build isolation: what is built from source (deepspeed) must see the image's torch and not download another.
PIP_CONSTRAINT=$constraints "$python" -m pip install --no-build-isolation -r requirements/base.txt -r requirements/dev.txt
"$python" docker/check_image.py verify "$constraints" --without "${without[@]}"
