"""How many examples a property is tried on: one place, for all tests.

`JAXATTN_EXAMPLES=25 make test` makes a quick run, which also takes a fifth of the cases of every test. The
suite on the oldest JAX is one, since it looks for what that version lacks and not for what nobody has
thought of.
"""

import os

EXAMPLES = int(os.environ.get("JAXATTN_EXAMPLES", "50"))
THOROUGH = 5000
"""Examples of the tests marked `slow`."""
IS_QUICK = EXAMPLES < 30
KEPT_EVERY = 5
"""Of a test's cases every fifth is kept: no factor of two, three or four values has the same one in all."""
