"""Norms of inputs beside the norms of their sparse codes: eps-LBO and the ZF plot."""
