"""What runs came to, from the files they wrote: pages, tables, figures. Must not know torch or how a run trains."""
