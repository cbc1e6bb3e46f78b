"""What runs leave on disk, and what is made of it. Nothing here imports torch.

On disk      schema (result rows, the results tree), cells (CSV text), state (how far a run is)
Runs         load (a tree's runs), condition and where (`--where`), diff (two runs)
Comparison   labels (what rows and blocks are called), compare (rows and differences), statistics
             (over seeds), bootstrap and images (over test images), published (the literature),
             views (crossed with another key, class by class), gates
As text      wording (outcome, legend), sheets (tables of text), export (terminal, Markdown, LaTeX,
             CSV, JSON, HTML)
As figures   plots (any figure), figures (of a comparison), panels, axes, ranks, curves, looks
As a page    page, sections (tables), charts and marks (plots), assets/ (style and script)
Elsewhere    longtail (what `prepare` shows), inspection (what `inspect` shows)
"""
