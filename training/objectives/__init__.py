"""The objectives. One file has an objective's options, defaults and loss. Imports no PyTorch."""

from __future__ import annotations

from training.objectives import (
    loss_cd,
    loss_cm_cd,
    loss_cm_ct,
    loss_ct,
    loss_diffusion,
    loss_direct,
    loss_ect,
    loss_flowmap,
    loss_ict,
    loss_mm,
    loss_pd,
    loss_scd,
    loss_sct,
    loss_sid,
    loss_tcm,
)

OBJECTIVES = {
    'diffusion': loss_diffusion.OBJECTIVE,
    'mcd': loss_cd.OBJECTIVE,
    'mct': loss_ct.OBJECTIVE,
    'direct': loss_direct.OBJECTIVE,
    'pd': loss_pd.OBJECTIVE,
    'flowmap': loss_flowmap.OBJECTIVE,
    'cm-cd': loss_cm_cd.OBJECTIVE,
    'cm-ct': loss_cm_ct.OBJECTIVE,
    'ict': loss_ict.OBJECTIVE,
    'ect': loss_ect.OBJECTIVE,
    'tcm': loss_tcm.OBJECTIVE,
    'scd': loss_scd.OBJECTIVE,
    'sct': loss_sct.OBJECTIVE,
    'mm': loss_mm.OBJECTIVE,
    'sid': loss_sid.OBJECTIVE,
}


def objectives_with(option: str) -> list[str]:
    """The objectives that have an option."""
    return [name for name, objective in OBJECTIVES.items() if option in objective.own_defaults]
