"""Run ``asgi-sse`` as ``python -m asgi_sse``."""

import sys

from asgi_sse.cli.main import main

sys.exit(main())
