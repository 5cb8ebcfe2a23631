# SPDX-License-Identifier: Apache-2.0
"""Faults for `python -m tests.mutate`: in one file one text in place of another, and the tests that must fail then.

No test that looks for the changed text itself in the sources is among them: it would fail for the wrong reason.
"""

from tests.mutations import headers, host, kernels
from tests.mutations.mutation import Mutation

MUTATIONS = headers.MUTATIONS | kernels.MUTATIONS | host.MUTATIONS
__all__ = ["MUTATIONS", "Mutation"]
