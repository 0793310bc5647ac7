"""``python -m asgi_sse``: see `asgi_sse.cli`."""

import sys

from .cli import main

sys.exit(main())
