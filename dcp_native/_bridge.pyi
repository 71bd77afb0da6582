"""The C++ side: torch's tensors and process groups as a table of C functions for `_native`.

Importing it needs the very torch release it was built for; another one is an ImportError that
names both.
"""

from typing import Final

# A capsule "dcp_native._bridge.table" that holds a struct dcp_bridge_table (dcp_bridge.h).
table: Final[object]
# The torch release it was built for, "2.13.0".
torch_version: Final[str]
