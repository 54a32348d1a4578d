"""What people read: the table of figures, model cards, the report's pages."""
