from __future__ import annotations

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import NotSaved, StoreError
from trainfleet.store import MemoryStore
from trainfleet.training.last_save import refuse_unsaved_end


def test_all_ranks_hear_what_one_could_not_save():
    checkpointer = Checkpointer(MemoryStore())
    checkpointer.save(3, m=Held(w=np.ones(2))).wait()

    def end(group):
        failed = StoreError("The disk is full.", hint="Make room.") if group.rank == 1 else None
        with pytest.raises(NotSaved, match=r"after step 5, but .*: The disk is full\. .* of step 3") as refused:
            refuse_unsaved_end(checkpointer, group, 5, failed)
        return refused.value.hint, refused.value.exit_code

    assert run_ranks(2, end) == [("Make room.", 15)] * 2


def test_nothing_is_said_where_all_is_saved():
    run_ranks(2, lambda group: refuse_unsaved_end(Checkpointer(MemoryStore()), group, 5, None))


def test_a_store_that_has_vanished_does_not_hide_the_reason():
    class Gone(MemoryStore):
        def names(self, prefix=""):
            raise StoreError("The folder vanished.")

    def end(group):
        with pytest.raises(NotSaved, match=r"The disk is full\. .* cannot be seen: The folder vanished"):
            refuse_unsaved_end(Checkpointer(Gone()), group, 5, StoreError("The disk is full."))

    run_ranks(1, end)
