from __future__ import annotations

import pytest

from trainfleet.doctor.variables import check_variables


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "slow"),
        ({"TORCH_DISTRIBUTED_DEBUG": "detail"}, "slow"),
        ({"OMP_PROC_BIND": "TRUE"}, "pinned to the same cores"),
        ({"RANK": "3", "WORLD_SIZE": "8"}, "RANK=3, WORLD_SIZE=8 in this shell"),
        ({"HTTPS_PROXY": "http://me:secret@proxy:3128", "no_proxy": "example.org"}, "does not name localhost"),
    ],
)
def test_what_hurts_is_named_with_its_remedy(variables, said):
    (found,) = check_variables(variables)
    assert found.verdict == "note" and said in found.fact and found.remedy
    assert "secret" not in found.fact + found.remedy


def test_what_does_no_harm_is_not_named():
    fine = {"CUDA_LAUNCH_BLOCKING": "0", "http_proxy": "http://proxy", "no_proxy": "localhost, .lan", "PATH": "/bin"}
    assert list(check_variables(fine)) == []
