"""What ``opensora-run`` runs."""
