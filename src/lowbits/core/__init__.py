"""The part that everything else stands on: packed layers, surgery, selection, sources, reports."""
