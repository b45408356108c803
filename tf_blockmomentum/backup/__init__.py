"""Backups of the exact state of a training, and a fit that goes on from one."""

from tf_blockmomentum.backup.callback import BlockBackup

__all__ = ["BlockBackup"]
