"""Judges that compare or grade answers, and the audit that a judge must pass."""
