import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// Every address is relative: the page may stand behind a proxy that adds a prefix to its path.
export default defineConfig({
  base: "./",
  plugins: [react()],
  build: {
    assetsDir: "graphql/assets",
    // What is bundled goes into the wheel, and its authors' notices with it.
    license: { fileName: "graphql/assets/licenses.md" },
    // Monaco is one large file, whatever one does.
    chunkSizeWarningLimit: 6_000,
    rolldownOptions: {
      // Libraries' hints to React's compiler, which does not run here.
      onLog: (level, log, show) => {
        if (log.code !== "MODULE_LEVEL_DIRECTIVE") show(level, log);
      },
    },
  },
});
