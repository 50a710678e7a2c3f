"""What people read: tables, explanations, JSON."""
