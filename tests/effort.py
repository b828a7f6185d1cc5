"""How many examples a property is tried on: one place, for all tests.

`JAXATTN_EXAMPLES=25 make test` makes a quick run; the suite on the oldest JAX is one, since it looks for
what that version lacks and not for what nobody has thought of.
"""

import os

EXAMPLES = int(os.environ.get("JAXATTN_EXAMPLES", "200"))
THOROUGH = 5000
"""Examples of the tests marked `slow`."""
