"""GraftLM Studio: the same work in the browser.

    graftlm studio --workspace DIR

The pages watch and start; the work is done by processes of their own (`job`), which write what they do into their folders in
the workspace. So the studio can be closed, reloaded or killed while a run goes on. Folders are the truth; the SQLite file is
an index over them that can be thrown away (`--rebuild`).

| module | what it holds |
|---|---|
| `workspace` | the folders, and which paths are inside them |
| `doors` | who may come in: token and cookie, Host, Origin, CSRF; the headers that every answer carries |
| `records` | JSON files that appear whole |
| `jobs`, `job` | the queue and its processes; what such a process does |
| `progress` | what a run wrote while it went, read bit by bit |
| `index` | the SQLite file |
| `worker`, `errands` | a process with the libraries imported, asked for checks, plans and rows |
| `forms` | between a recipe's schema, a form and YAML |
| `server` | the child process that chats |
| `studio`, `app`, `running` | what all pages share; the app; its server |
| `words` | the pages' language |
| `views` | one file a page |
"""
