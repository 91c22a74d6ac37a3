"""Reports of figures: tables, charts and pages of HTML, in several languages."""
