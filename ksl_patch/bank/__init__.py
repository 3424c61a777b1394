"""The bank: device tensors that hold the rows of every loaded patch, found by (slot, token id) in one step."""

from ksl_patch.bank.fixed import SlotBank
from ksl_patch.bank.growing import PatchBank
from ksl_patch.bank.lookup import BankTensors, SlotRows

__all__ = ["BankTensors", "PatchBank", "SlotBank", "SlotRows"]
