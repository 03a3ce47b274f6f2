"""PEP 517 backend: setuptools, building against the torch that will run the extension.

A plain `torch` in build-system.requires would fetch the newest release into an isolated environment, and an
extension built against one minor version of torch does not load in another. So: where the environment that installs
has torch, that torch is used (its folder goes last on the path, hiding nothing of the isolated environment);
only where there is none is torch a build requirement.
"""

import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)


def _folder_with_torch():
    for scheme in ("platlib", "purelib"):
        folder = Path(sysconfig.get_path(scheme))
        if (folder / "torch" / "version.py").exists():
            return str(folder)
    return None


_host = _folder_with_torch()
if _host is not None and _host not in sys.path:
    sys.path.append(_host)


# Setuptools would run setup.py to answer these, which imports torch.
def get_requires_for_build_wheel(config_settings=None):
    return [] if _host is not None else ["torch"]


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
